"""The blocks of docs/architecture.md run as they stand, and what each adds from outside of the package works to the end."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import one_device, read_images, tiny

from ddpm_jax import Experiment, load_run, make_sampler, make_schedule, sample, train
from ddpm_jax.commands import cli
from ddpm_jax.config import ConfigError, check
from ddpm_jax.core.sharding import make_mesh
from ddpm_jax.data import SOURCES, open_source
from ddpm_jax.diffusion.losses import LOSSES
from ddpm_jax.diffusion.process import Process
from ddpm_jax.diffusion.schedules import BETAS
from ddpm_jax.evaluation.evaluators import EVALUATORS
from ddpm_jax.evaluation.metrics import METRICS
from ddpm_jax.generation.generator import SamplerOptions, make_generator, sample_key
from ddpm_jax.sampling import SAMPLERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BLOCKS = dict(
    re.findall(
        r"### (An? [^\n]+)\n(?:(?!###).)*?```python\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.S
    )
)
TABLES = {
    "A sampler": (SAMPLERS, "posterior"),
    "A schedule": (BETAS, "cubic"),
    "A loss": (LOSSES, "huber"),
    "A metric": (METRICS, "spread"),
    "A data source": (SOURCES, "squares"),
    "An evaluator": (EVALUATORS, "ema_norm"),
}


def run_block(heading):
    names = {"__name__": "block"}
    exec(compile(BLOCKS[heading], f"docs/architecture.md, {heading}", "exec"), names)
    return names


@pytest.fixture(scope="module", autouse=True)
def extended():
    """All blocks run; the tables are as before afterwards."""
    before = {heading: dict(table) for heading, (table, _) in TABLES.items()}
    for heading in TABLES:
        run_block(heading)
    yield
    for heading, (table, _) in TABLES.items():
        table.clear()
        table.update(before[heading])


def command(name, *arguments):
    """Runs a command with a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
        cli.prepare(name)()


CONFIG_FILE = """
from tiny import tiny

small = {"ch_mult": (1,), "attn_resolutions": (8,)}
config = tiny(data={"source": "squares"}, model=small, train={"steps": 4, "log_every": 2, "save_every": 4, "sample_every": 0})
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run that train.py made with the new source, schedule, loss and evaluator; the last stands in its config file."""
    folder = tmp_path_factory.mktemp("extended")
    (folder / "mine.py").write_text(BLOCKS["An evaluator"] + CONFIG_FILE)
    options = ("--diffusion.schedule", "cubic", "--diffusion.loss", "huber")
    command("train", folder / "mine.py", "--workdir", folder / "run", *options)
    return folder / "run"


def test_every_block_is_of_something_that_is_added():
    assert set(BLOCKS) == {*TABLES, "A network"}
    for heading, (table, name) in TABLES.items():
        assert name in table, heading
        assert len(BLOCKS[heading].strip().splitlines()) <= 16, heading


def test_schedule_loss_and_source_train(workdir):
    config = json.loads((workdir / "config.json").read_text())
    assert (config["diffusion"]["schedule"], config["diffusion"]["loss"]) == ("cubic", "huber")
    assert config["data"]["source"] == "squares"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    run = load_run(workdir)
    assert run.step == 4
    np.testing.assert_allclose(
        run.experiment.process.schedule.betas, np.linspace(5e-3 ** (1 / 3), 0.5 ** (1 / 3), 20) ** 3
    )


def test_the_evaluator_is_asked_at_its_steps(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "ema_norm" in line] == [2, 4]


def test_the_source_opens_by_its_name():
    source = open_source(tiny(data={"source": "squares"}).data)
    assert source.images.shape == (25, 8, 8, 1)
    np.testing.assert_array_equal(source.labels, np.arange(25))
    assert (source.images == 255).sum() == 25 * 16


def test_the_loss_is_half_of_l_simple_where_errors_are_small():
    process, x_0 = Process(make_schedule("cubic", T=10)), jnp.zeros((3, 4, 4, 1))
    t, eps = jnp.arange(3), jnp.full((3, 4, 4, 1), 0.5)
    losses = {name: LOSSES[name](process, lambda x_t, t: 0 * x_t, x_0, t, eps) for name in ("huber", "simple")}
    np.testing.assert_allclose(losses["huber"], losses["simple"] / 2)


def test_the_sampler_draws_what_ddim_with_eta_1_does():
    """The same distribution, and so, with the same noise, the same images to rounding."""
    process = Process(make_schedule("linear", T=50, beta_start=1e-3, beta_end=0.3))
    assert make_sampler(process, "posterior", steps=10).order is None

    def draw(**options):
        model = lambda x_t, t: 0.5 * x_t  # noqa: E731
        return sample(process, model, jax.random.key(0), jnp.arange(3), image_shape=(4, 4, 1), steps=10, **options)

    np.testing.assert_allclose(draw(sampler="posterior"), draw(sampler="ddim", eta=1.0), atol=1e-5)


def test_the_sampler_is_taken_by_the_generator_and_by_the_command_line(workdir, tmp_path):
    run, options = load_run(workdir), SamplerOptions(sampler="posterior", steps=(5,))
    images = make_generator(run.experiment, make_mesh(), options)(run.params, sample_key(3), np.arange(8))
    arguments = ("--num-images", 8, "--batch-size", 8, "--seed", 3, "--format", "npz", "--out", tmp_path / "out")
    command("sample", workdir, "--sampler", "posterior", "--steps", 5, *arguments)
    np.testing.assert_array_equal(read_images(tmp_path / "out" / "images.npz"), images)


def test_the_metric_is_evaluated_by_the_command_line_and_reported(workdir):
    few = ("--num-images", 8, "--num-real", 8, "--batch-size", 8, "--no-figures")
    command("evaluate", workdir, "--features", "pixels", "--metrics", "spread", *few)
    (path,) = (workdir / "evaluation").glob("spread-*.json")
    result = json.loads(path.read_text())
    assert 0 < result["value"] < 1
    assert result["definition"]["sampling"]["images"] == 8
    assert "spread" in (workdir / "report.html").read_text()


@pytest.mark.parametrize(
    ("script", "option", "name", "arguments"),
    [
        ("sample", "--sampler", "posterior", ["runs/x"]),
        ("evaluate", "--metrics", "spread", ["runs/x"]),
        ("evaluate", "--sampler", "posterior", ["runs/x"]),
        ("train", "--diffusion.schedule", "cubic", [ROOT / "configs/digits.py"]),
        ("train", "--diffusion.loss", "huber", [ROOT / "configs/digits.py"]),
    ],
)
def test_the_command_line_offers_it(script, option, name, arguments, capsys, monkeypatch):
    """In its help, and where another name is refused."""
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        command(script, *arguments, "--help")
    assert re.search(rf"{option} \S*\{{[\w,+-]*\b{name}\b", capsys.readouterr().out)
    with pytest.raises(SystemExit) as refused:
        command(script, *arguments, option, "unknown")
    assert refused.value.code == 2
    assert f"'{name}'" in capsys.readouterr().err


@pytest.mark.parametrize(("field", "name"), [("schedule", "cubic"), ("loss", "huber")])
def test_the_config_takes_what_the_table_has(field, name):
    check(tiny(diffusion={field: name}))
    with pytest.raises(ConfigError, match=rf"diffusion\.{field}='unknown' is not one of .*\b{name}\b"):
        check(tiny(diffusion={field: "unknown"}))


def test_the_network_trains_and_is_loaded_again(tmp_path):
    names = run_block("A network")
    assert names["experiment"].has_own_network
    network = names["Small"]()
    experiment = Experiment.from_config(tiny(train={"steps": 2, "save_every": 2, "log_every": 2}), network=network)
    state = train(experiment, tmp_path / "run", mesh=one_device())
    run = load_run(tmp_path / "run", network=network)
    assert run.step == int(state.step) == 2
    jax.tree.map(np.testing.assert_array_equal, run.params, state.ema_params)
