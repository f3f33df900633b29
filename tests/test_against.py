"""benchmark.py --against: the rule, the alternation, what is left out. Versions are small fakes with a clock of their own."""

import contextlib
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from interop import run_script
from scipy.stats import binom

from ddpm_jax.benchmark import against, comparison
from ddpm_jax.benchmark.comparison import Comparison, rank
from ddpm_jax.commands.arguments import PARSERS
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.commands.configs import shipped
from ddpm_jax.config import Config, from_json
from ddpm_jax.core import provenance
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.core.version import __version__

ROOT = Path(__file__).parent.parent

# ---- The rule


@pytest.mark.parametrize("repeats", [*range(5, 30), 100, 1001])
def test_the_interval_is_the_narrowest_that_chance_allows(repeats):
    coin = binom(repeats, 0.5)
    assert coin.cdf(rank(repeats) - 1) <= (1 / 32) * (1 + 1e-12) < coin.cdf(rank(repeats))


def test_fewer_repeats_than_the_fewest_have_no_interval():
    assert rank(comparison.FEWEST - 1) == 0
    assert rank(comparison.FEWEST) == 1


@pytest.mark.parametrize(
    ("this", "other", "verdict"),
    [
        ([1.2] * 5, [1.0] * 5, "slower"),
        ([1.0] * 5, [1.2] * 5, "faster"),
        ([1.0] * 5, [1.0] * 5, "same"),
        ([1.04] * 5, [1.0] * 5, "same"),  # within what two processes of one version differ by
        ([1.0] * 5, [1.04] * 5, "same"),
        ([1.2, 1.2, 1.2, 1.2, 1.0], [1.0] * 5, "same"),  # noisy: one pair of five says otherwise
        ([1.2] * 8 + [0.9], [1.0] * 9, "slower"),  # one pair of nine may
        ([1.2, 3.6, 12.0, 2.4, 1.2], [1.0, 3.0, 10.0, 2.0, 1.0], "slower"),  # slow phases of the machine
    ],
)
def test_a_version_is_slower_if_the_whole_interval_is_beyond_the_tolerance(this, other, verdict):
    assert Comparison(this, other).verdict == verdict


def test_the_rule_is_the_documented_one():
    """Of 5 repeats from the lowest to the highest ratio, of 9 without these two; the whole interval above 1.05."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        "with 5 repeats from the lowest to the highest ratio, with 9 from the second lowest to the second highest"
        in readme
    )
    assert (rank(5), rank(8), rank(9)) == (1, 1, 2)
    assert f"interval lies above {1 + comparison.TOLERANCE}. " in readme
    assert f"below 1 in {comparison.CHANCE}" in readme


def test_the_ratio_is_the_median_of_neighbours_and_the_interval_holds_it():
    compared = Comparison([2.0, 30.0, 4.0, 9.0, 6.0], [1.0, 10.0, 4.0, 2.0, 4.0])
    assert compared.ratio == 2.0
    assert compared.interval == (1.0, 4.5)


@pytest.mark.parametrize("repeats", [5, 9, 12])
def test_versions_of_one_speed_are_told_apart_as_seldom_as_promised(repeats, monkeypatch):
    """Even without a tolerance, and whatever the machine does to both: noise of heavy tails in slow and fast phases."""
    monkeypatch.setattr(comparison, "TOLERANCE", 0.0)
    rng, trials = np.random.default_rng(0), 4000
    phase = rng.choice([1.0, 7.0], (trials, repeats))
    this, other = phase * np.exp(0.3 * rng.standard_t(2, (2, trials, repeats)))
    told = [Comparison(list(a), list(b)).verdict for a, b in zip(this, other, strict=True)]
    chance = binom(repeats, 0.5).cdf(rank(repeats) - 1)
    for verdict in ("slower", "faster"):
        assert told.count(verdict) == pytest.approx(trials * chance, abs=4 * np.sqrt(trials * chance))


# ---- Two versions

TIMING = """
def environment():
    return {"device": "cpu", "cores": 2, "versions": {"ddpm-jax": "1.0", "jax": "0.10"}}
"""


@pytest.fixture
def version(tmp_path):
    """Writes a version whose calls take the given seconds of its own clock. body: what else its command does first."""

    def write(name, seconds, body="pass"):
        package = tmp_path / name / "ddpm_jax"
        (package / "benchmark").mkdir(parents=True)
        (package / "benchmark" / "__init__.py").touch()
        (package / "benchmark" / "timing.py").write_text(TIMING)
        (package / "__init__.py").write_text(f"__version__ = '{name}'")
        (package / "__main__.py").write_text(f"""
import os, sys, time
from ddpm_jax.benchmark import timing
now, seconds = 0.0, iter({seconds!r})
time.perf_counter = lambda: now
def call():
    global now
    for what in "<>":
        with open({str(tmp_path / "calls")!r}, "a") as file:
            file.write(what + {name!r})
    now += next(seconds)
print("for people")
{body}
timing.take_turns([call, None], 5)
""")
        return package.parent

    return write


@pytest.fixture
def benchmark(monkeypatch, version):
    """Runs benchmark.py with a fake in this version's place, whose calls take a second."""
    monkeypatch.setattr(against, "THIS", version("this", [9.0] + 5 * [1.0]))
    return lambda *arguments: run_script("benchmark", *arguments)


SMALL = ("digits", "--train.steps-per-dispatch", "1", "--train.batch-size", "2")
ROW = (*SMALL, "--samplers", "ddim", "--steps", "5", "--batch-sizes", "2", "--repeats", "5")


def check_readable(content):
    """What a file of --json has, so that a reader can compare: the command, the machine, the versions and every repeat."""
    assert set(content) == {"command", "config", "environment", "rows"}
    from_json(content["config"])
    PARSERS["benchmark"](shlex.split(content["command"])[1:])
    assert {"device", "cores", "versions"} <= set(content["environment"])
    assert {"ddpm-jax", "jax"} <= set(content["environment"]["versions"])
    assert content["rows"]
    for row in content["rows"]:
        measured = [name.removesuffix("repeats_s") for name in row if name.endswith("repeats_s")]
        assert measured or row["left_out"]
        for of in measured:
            assert row[f"{of}median_s"] == statistics.median(row[f"{of}repeats_s"])


def test_calls_take_turns_and_never_overlap(benchmark, version, tmp_path, capsys):
    other = version("other", [7.0, 1.02, 0.98, 1.0, 1.0, 1.0])
    benchmark(*ROW, "--against", other, "--json", tmp_path / "rows.json")
    assert (tmp_path / "calls").read_text() == 6 * "<this>this<other>other"
    told = json.loads((tmp_path / "rows.json").read_text())
    check_readable(told)
    [row] = told["rows"]
    assert row["this_repeats_s"] == pytest.approx(5 * [1.0])
    assert row["other_repeats_s"] == pytest.approx([1.02, 0.98, 1.0, 1.0, 1.0])
    assert (row["this_warm_up_s"], row["other_warm_up_s"], row["verdict"]) == (9.0, 7.0, "same")
    assert (told["environment"]["this"], told["environment"]["other"]) == ("this, this", "other, other")
    header, line = capsys.readouterr().out.splitlines()[:2]
    assert header.startswith(
        "what  steps  batch  dtype    this: median s  spread  other: median s  spread  this / other  "
    )
    assert line.split()[4:] == ["1.0000", "0.0%", "1.0000", "4.0%", "1.000", "0.980", "1.020", "same"]


def test_a_slower_version_fails_and_the_sentence_names_the_rows(benchmark, version, capsys):
    other = version("other", 6 * [0.8])
    with pytest.raises(RunError, match=r"in ddim \(steps 5, batch 2, float32\) by 25%, train step \(.*\) by 25%$"):
        benchmark(*ROW, "--train", "--against", other)
    assert capsys.readouterr().out.count("slower") == 2


def test_a_faster_version_passes(benchmark, version, capsys):
    benchmark(*ROW, "--against", version("other", 6 * [1.2]))
    assert "faster" in capsys.readouterr().out


BOX = """print('''
╭─ Unrecognized options ────────────────╮
│ Unrecognized options: --samplers, new │
│ ───────────────────────────────────── │
│ For full helptext, run x --help       │
╰───────────────────────────────────────╯''', file=sys.stderr); sys.exit(2)"""


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (BOX, "Unrecognized options: --samplers, new"),
        ("sys.exit('ddpm-jax benchmark: there is no such thing.')", "there is no such thing"),
        ("raise NotImplementedError('of old')", "NotImplementedError: of old"),
        ("os.kill(os.getpid(), 9)", "SIGKILL ended it"),
        ("os._exit(3)", "for people"),
    ],
)
def test_a_row_that_the_other_does_not_know_is_left_out_with_its_sentence(body, sentence, benchmark, version, capsys):
    other = version("other", 6 * [1.0], f"if '--train' in sys.argv:\n        {body}")
    benchmark(*ROW, "--train", "--against", other)
    out = capsys.readouterr().out
    assert "ddim (" not in out
    assert f"train step (steps 1, batch 2, float32) is left out, as the other version cannot run it: {sentence}." in out


def test_a_version_that_ends_between_two_calls_is_told(benchmark, version):
    with pytest.raises(UsageError, match="nothing was compared"):
        benchmark(*ROW, "--against", version("other", [1.0, 1.0]))


def test_what_this_version_refuses_ends_the_command(monkeypatch, version, benchmark):
    other = version("other", 6 * [1.0])
    for name, body, kind, sentence in (
        ("refuses", "print('ddpm-jax benchmark: no.', file=sys.stderr); sys.exit(2)", UsageError, "^no$"),
        (
            "fails",
            "raise MemoryError",
            RunError,
            r"^ddim \(.*\) cannot be measured in this version \(MemoryError\); the same",
        ),
    ):
        monkeypatch.setattr(against, "THIS", version(name, [], body))
        with pytest.raises(kind, match=sentence):
            benchmark(*ROW, "--against", other)


def test_what_is_imported_is_in_the_folder(benchmark, version, tmp_path):
    """A folder that Python takes for no package: what is installed would be measured."""
    other = version("other", 6 * [1.0])
    (other / "ddpm_jax" / "__init__.py").rename(other / "ddpm_jax.py")
    (other / "ddpm_jax" / "__init__.py").mkdir()
    with pytest.raises(UsageError, match="other has no ddpm_jax/ in it; give the folder of another checkout"):
        benchmark(*ROW, "--against", other)
    nowhere = against.start("other", tmp_path / "nowhere", [])
    with pytest.raises(against.WorkerError, match=r"ddpm_jax.*, which is not in .*nowhere"), nowhere:
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "tests"), "--against tests has no ddpm_jax/ in it; give the folder of another checkout"),
        (
            ("--against", ".", "--compile-for", "v5e:2x4"),
            "--against measures and --compile-for runs nothing; leave out one",
        ),
        (("--against", ".", "--peer", "torch"), "--peer has no meaning for --against, which compares two versions"),
        (("--against", ".", "--peak-tflops", "3"), "--peak-tflops has no meaning for --against"),
        (("--against", ".", "--repeats", "4"), "--repeats 4 is too small for --against; use 5 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=message):
        run_script("benchmark", "digits", *options)


parse = PARSERS["benchmark"]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_both_are_given_the_same_config(name):
    """Of a shipped config all that is not the default, so that it does not matter which files the other version has."""
    asked = parse([name, "--train.batch-size", "32", "--model.ch-mult", "1", "2"])
    first, *options = asked.words
    assert load_config(first) == Config()
    assert parse([first, *options]).config == asked.config
    assert ("--train.ema-warmup" in options) == asked.config.train.ema_warmup


def test_a_config_of_ones_own_is_executed_by_both(tmp_path, monkeypatch):
    """It may add a sampler of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from ddpm_jax.config import Config\nconfig = Config(seed=3)\n")
    words = (str(tmp_path / "mine.py"), "--train.batch-size", "8")
    assert parse(["mine.py", "--train.batch-size", "8"]).words == words


def test_each_row_is_asked_for_by_itself():
    rows = ("--samplers", "heun", "ddim", "--steps", "5", "9", "--dtypes", "float32", "bfloat16", "--train", "--data")
    asked = parse(["cifar10", *rows])
    alone = [
        (labels, parse(["cifar10", *options]).plan) for labels, options in against.single_rows(asked.config, asked.plan)
    ]
    assert len(alone) == 2 * (2 * 2 * 2 + 1) + 1
    for labels, plan in alone:
        assert len(plan.samplers) + plan.train + plan.data == 1
        if plan.samplers:
            assert (plan.samplers, plan.steps) == ((labels["what"],), (labels["steps"],))
            assert (plan.batch_sizes, plan.dtypes) == ((labels["batch"],), (labels["dtype"],))


# ---- Processes


def test_both_processes_are_gone_after_an_interrupt(version):
    folder = version("it", 6 * [1.0])
    with (
        pytest.raises(KeyboardInterrupt),
        against.start("this", folder, []) as a,
        against.start("other", folder, []) as b,
    ):
        raise KeyboardInterrupt
    assert [worker._process.returncode for worker in (a, b)] == [-9, -9]


def test_a_process_whose_asker_is_gone_ends_by_itself(version):
    folder = version("it", 6 * [1.0])
    command = [sys.executable, "-P", against.WORKER, folder]
    ended = subprocess.run(
        command, env={"PYTHONPATH": str(folder)}, input="\n\n", capture_output=True, text=True, check=True
    )
    about, *seconds = map(json.loads, ended.stdout.splitlines())
    assert about["version"] == "it"
    assert seconds == [1.0, 1.0]
    assert ended.stderr == "for people\n"


def test_the_commit_of_a_checkout_is_told(tmp_path):
    assert provenance.commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("git is not installed")
    (tmp_path / "x").write_text("1")
    subprocess.run([*git, "add", "x"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    clean = provenance.commit(tmp_path)
    (tmp_path / "x").write_text("2")
    assert len(clean) >= 7
    assert provenance.commit(tmp_path) == f"{clean}-dirty"


# ---- The real thing


KEPT = ROOT / "results" / "benchmarks"


def test_every_kept_benchmark_is_readable_and_its_command_can_be_parsed():
    for path in KEPT.glob("*.json"):
        check_readable(json.loads(path.read_text()))
    line = re.search(r"^python benchmark\.py (.*)$", (KEPT / "README.md").read_text(), re.MULTILINE)[1]
    assert Path(parse(line.split()).json).parent == KEPT.relative_to(ROOT)


@pytest.mark.slow
def test_this_version_beside_itself(tmp_path, capsys):
    """The natural control. It says nothing of the verdict, since no test asserts a time."""
    (tmp_path / "small.py").write_text("""
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
config = Config(
    data=DataConfig(source="digits", image_size=8, channels=1), diffusion=DiffusionConfig(T=10),
    model=ModelConfig(ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(8,), groups=4),
)
""")
    options = ("--samplers", "ddim", "--steps", 2, "--batch-sizes", 1, "--repeats", 7, "--against", ROOT)
    with contextlib.suppress(RunError):
        run_script("benchmark", tmp_path / "small.py", *options, "--json", tmp_path / "rows.json")
    told = json.loads((tmp_path / "rows.json").read_text())
    check_readable(told)
    [row] = told["rows"]
    assert len(row["this_repeats_s"]) == len(row["other_repeats_s"]) == 7
    assert 0 < row["low"] <= row["ratio"] <= row["high"]
    assert told["environment"]["this"] == told["environment"]["other"]
    assert told["environment"]["this"].startswith(f"{__version__}, ")
    assert told["environment"]["versions"]["jax"] == jax.__version__
