"""The ablations of results/ablations: their plan, commands and tables, and runs that are interrupted and go on."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import typing
from pathlib import Path

import ablations
import jax
import jax.numpy as jnp
import measure
import numpy as np
import pytest
import tables
from etils import epath
from PIL import Image
from plan import GROUPS, SAMPLERS, SAMPLING, VARIANTS, betas, commands, config_of, measurements, plan, row_file
from tiny import experiment, tiny

from ddpm_jax.commands.arguments import PARSERS
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import check
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.diffusion.process import Process
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.generation.starts import build_sampler

DIGITS = load_config("digits")
SCRIPT = Path(__file__).parent.parent / "results" / "ablations" / "ablations.py"
TRAINED = [key for key in VARIANTS if key not in SAMPLING]


# ---- The plan


def test_every_variant_is_of_a_group_and_every_group_an_option():
    assert typing.get_args(ablations.Name) == tuple(GROUPS)
    assert {key for group in GROUPS.values() for key in group.variants.values()} == set(VARIANTS)
    assert all("baseline" in group.variants.values() for group in GROUPS.values())


def test_the_baseline_is_the_config_itself():
    assert dataclasses.replace(config_of(DIGITS, "baseline", 0), train=DIGITS.train) == DIGITS
    for name, value in betas(DIGITS.diffusion.T).items():
        assert getattr(DIGITS.diffusion, name) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("key", TRAINED)
def test_a_run_is_what_its_commands_say(key):
    config = config_of(DIGITS, key, 2)
    assert check(config) == []  # also no warning: every schedule ends in noise
    train, *evaluations = map(shlex.split, commands(DIGITS, key, 2))
    parsed = PARSERS["train"](train[2:])
    assert (parsed.config, parsed.workdir) == (config, f"runs/ablations/{key}/seed_2")
    for words, (metrics, amount) in zip(evaluations, measurements(key, config.diffusion.T), strict=True):
        parsed = PARSERS["evaluate"](words[2:])
        assert (parsed.workdir, parsed.features, parsed.metrics) == (f"runs/ablations/{key}/seed_2", "pixels", metrics)
        assert parsed.options == amount
        assert parsed.sampler == VARIANTS[key].sampler


@pytest.mark.parametrize("key", SAMPLING)
def test_a_sampler_is_what_its_command_says_and_evaluates_the_network_so_often(key):
    train, evaluation = map(shlex.split, commands(DIGITS, key, 1))
    assert train == shlex.split(commands(DIGITS, "baseline", 1)[0])
    sampler = PARSERS["evaluate"](evaluation[2:]).sampler
    assert sampler == VARIANTS[key].sampler
    name, _, most = key.rpartition("-")
    steps, diffusion = sampler.steps[0], DIGITS.diffusion
    process = Process(make_schedule("linear", T=100, beta_start=diffusion.beta_start, beta_end=diffusion.beta_end))
    evaluations = len(build_sampler(process, sampler))
    assert evaluations == steps * SAMPLERS[name] - (SAMPLERS[name] - 1)  # heun's last step has one
    assert int(most) - 1 <= evaluations <= int(most)


def test_plan_has_each_run_once_and_one_seed_before_the_next():
    runs = plan((), 3)
    assert len(set(runs)) == len(runs) == 3 * len(VARIANTS)
    assert runs[: len(VARIANTS)] == [(key, 0) for key, _ in runs[: len(VARIANTS)]]
    assert plan(("schedule", "T"), 1) == [(key, 0) for key in ("baseline", "cosine", "T_50", "T_200", "T_1000")]


def test_every_training_sees_the_same_number_of_images():
    """So batch sizes are compared at one cost."""
    sizes = {key: config_of(DIGITS, key, 0).train for key in TRAINED}
    assert {train.steps * train.batch_size for train in sizes.values()} == {
        DIGITS.train.steps * DIGITS.train.batch_size
    }


def test_training_by_L_simple_is_the_same_with_either_fixed_variance():
    """So `fixed_large` may take the baseline's parameters."""

    def program(variance):
        made = experiment(tiny(diffusion={"variance": variance}, model={"ch_mult": (1,), "attn_resolutions": (8,)}))
        x, t = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2, jnp.int32)
        params = jax.eval_shape(made.init, jax.random.key(0))
        return str(jax.make_jaxpr(lambda p: made.loss(made.model(p), x, t, x))(params))

    assert VARIANTS["fixed_large"].changes == {"diffusion": {"variance": "fixed_large"}}
    assert VARIANTS["fixed_large"].parameters_of == "baseline"
    assert program("fixed_small") == program("fixed_large")


# ---- Rows and tables


def make_row(key, seed, *, shift=0.0):
    """Writes the row of a run that was never made, and returns it."""
    sampled = {"frechet_distance": 1.5 + shift, "precision": 0.5, "recall": 0.8}
    loss = {"bits_per_dim": 5.0 + shift, "rate": 2.5, "L_0": 2.5, **dict.fromkeys(tables.QUARTERS, 0.25)}
    row = {
        "variant": key,
        "seed": seed,
        "commands": commands(DIGITS, key, seed),
        "evaluations": 100,
        "figures": sampled if key in SAMPLING else loss | sampled,
        "seconds": {"training": 60.0, "evaluation": 40.4, "processor": 100.4},
        "environment": {"cores": 1},
    }
    path = Path(row_file(key, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return row


def test_spread_is_the_standard_deviation_over_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for shift in (-0.1, 0.0, 0.1):
        make_row("baseline", round(10 * shift) + 1, shift=shift)
    make_row("cosine", 0)
    made = measure.finished(DIGITS)
    text = tables.table(tables.of_group(GROUPS["schedule"], made))
    head, _, linear, cosine = text.splitlines()
    names = ["bits/dim", "rate", "L_0", "Fréchet distance", "precision", "recall", "loss by quarter of t"]
    assert head == f"|  | {' | '.join(names)} | network evaluations | seeds |"
    quarters = ", ".join(["0.2500"] * 4)
    assert linear == f"| linear | 5.00 ± 0.10 | 2.500 | 2.500 | 1.50 ± 0.10 | 0.5000 | 0.8000 | {quarters} | 100 | 3 |"
    assert cosine == f"| cosine | 5 | 2.500 | 2.500 | 1.500 | 0.5000 | 0.8000 | {quarters} | 100 | 1 |"


def test_tables_go_between_their_marks_and_leave_the_text():
    first = tables.insert("# Title\n\nBefore.\n", "| a |")
    assert first == f"# Title\n\nBefore.\n\n{tables.BEGIN}\n\n| a |\n\n{tables.END}\n"
    by_hand = first + "\n## After\n"
    second = tables.insert(by_hand, "| b |\n")
    assert second == by_hand.replace("| a |", "| b |")
    assert tables.insert(second, "| b |") == second
    assert tables.insert("", "| a |").startswith(tables.BEGIN)


def test_a_row_of_other_commands_or_a_damaged_one_is_no_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = make_row("v", 0)
    assert measure.read_row(DIGITS, "v", 0) == row
    assert measure.read_row(tiny(), "v", 0) is None
    assert measure.read_row(DIGITS, "v", 1) is None
    Path(row_file("v", 0)).write_text("{")
    assert measure.read_row(DIGITS, "v", 0) is None
    assert measure.finished(DIGITS) == {}


def test_report_has_the_groups_of_which_two_variants_are_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("baseline", "eps_L", "ddim-5", "ddim-10"):
        make_row(key, 0, shift=len(key) / 10)
    out = tmp_path / "out"
    tables.write_report(epath.Path(out), DIGITS)
    assert {path.name for path in out.iterdir()} == {"ablations.json", "README.md", "loss.png", "samplers.png"}
    text = (out / "README.md").read_text()
    assert re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)[1:3] == ["eps, L", "eps, L_simple"]
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["loss.png", "samplers.png"]
    for name in ("loss", "samplers"):
        with Image.open(out / f"{name}.png") as image:
            assert image.width < 1000
            assert len(np.unique(np.asarray(image.convert("L")))) > 10  # something is drawn
    content = json.loads((out / "ablations.json").read_text())
    assert [row["variant"] for row in content["rows"]] == ["baseline", "eps_L", "ddim-5", "ddim-10"]
    assert content["environments"] == [{"cores": 1}]
    assert {row["environment"] for row in content["rows"]} == {0}


# ---- The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Calls the command in an empty folder, with a function in the place of `carry_out`."""
    monkeypatch.chdir(tmp_path)

    def call(carry_out, *arguments):
        monkeypatch.setattr(measure, "carry_out", carry_out)
        monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments, "--out", str(tmp_path / "out")])
        ablations.main()

    return call


def test_a_run_that_fails_does_not_stop_the_others_and_finished_ones_are_not_repeated(command, tmp_path, capsys):
    carried_out = []

    def carry_out(base, key, seed):
        carried_out.append((key, seed))
        print("what training says", flush=True)
        print("and its bar", file=sys.stderr)
        if key == "cosine" and len(carried_out) < 3:
            raise RunError("the loss became nan")
        return make_row(key, seed)

    with pytest.raises(RunError, match=r"^1 of the runs failed; the same command tries them again$"):
        command(carry_out, "--only", "schedule", "--seeds", "1")
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "2 runs, of which 0 are finished.",
        "1/2 baseline, seed 0: bits/dim 5, distance 1.500, precision 0.5000, recall 0.8000 (100 s)",
        "2/2 cosine, seed 0 failed: the loss became nan",
    ]
    assert Path("runs/ablations/cosine/seed_0.log").read_text() == "what training says\nand its bar\n"
    command(carry_out, "--only", "schedule", "--seeds", "1")
    assert carried_out == [("baseline", 0), ("cosine", 0), ("cosine", 0)]
    assert capsys.readouterr().out.startswith("2 runs, of which 1 are finished.\n1/1 cosine, seed 0: ")
    assert "| cosine |" in (tmp_path / "out" / "README.md").read_text()


def test_command_line_is_read_before_jax_is_imported():
    """JAX reads where its compiled programs are kept when it is imported, which `cli.run` says only when it is called."""
    code = "import ablations, sys; assert not {'jax', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True, timeout=100)


def test_options_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"^--only is empty; give some of prediction, loss, .*, or leave it out"):
        ablations.parse(["--only"])
    with pytest.raises(UsageError, match="--seeds 0 is too small"):
        ablations.parse(["--seeds", "0"])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written .* choose another folder by --out"):
        ablations.parse(["--out", str(tmp_path / "file")])


CONFIG = """
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
config = Config(
    data=DataConfig(source="digits", image_size=8, channels=1),
    model=ModelConfig(ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0, groups=4),
    diffusion=DiffusionConfig(T=10, beta_start=0.01, beta_end=0.9, variance="fixed_small"),
    train=TrainConfig(steps=2, batch_size=8, warmup_steps=0, flip=False, log_every=2, save_every=2, sample_every=0),
)
"""


@pytest.mark.slow
def test_interrupted_ablations_go_on_and_end_with_the_figures_of_uninterrupted_ones(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "DDPM_JAX_CACHE": str(tmp_path / "cache")}
    (tmp_path / "small.py").write_text(CONFIG)
    script = [sys.executable, SCRIPT, "--only", "schedule", "--seeds", "1", "--out", "out"]

    def start(name):
        (tmp_path / name).mkdir(exist_ok=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        config = ["--config", tmp_path / "small.py"]
        return subprocess.Popen([*script, *config], cwd=tmp_path / name, env=environment, **pipes)

    def row(name, key):
        return json.loads((tmp_path / name / f"runs/ablations/{key}/seed_0.json").read_text())

    process = start("stopped")
    lines = [process.stdout.readline() for _ in range(2)]
    assert lines[1].startswith("1/2 baseline, seed 0: bits/dim "), process.communicate()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM
    assert re.search(r"ablations.py: SIGTERM: stopp.*; (finished runs are kept, and )?the same command", err), err
    assert "Traceback" not in err
    before = row("stopped", "baseline")
    for name in ("stopped", "whole"):
        process = start(name)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.startswith(f"2 runs, of which {1 if name == 'stopped' else 0} are finished.\n")
    assert row("stopped", "baseline") == before
    for key in ("baseline", "cosine"):
        assert row("stopped", key)["figures"] == row("whole", key)["figures"]
    text = (tmp_path / "stopped/out/README.md").read_text()
    assert re.findall(r"^\| (linear|cosine) \|", text, re.MULTILINE) == ["linear", "cosine"]
