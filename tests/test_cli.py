"""The scripts' answers: every mistake of a command line gets one clear message and exit code 2, before any work starts."""

import ast
import dataclasses
import errno
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from etils import epath

from ddpm_jax import config as configs
from ddpm_jax.benchmark.options import Plan
from ddpm_jax.commands import arguments, cli, train
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig, changeable
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.diffusion.losses import LOSSES
from ddpm_jax.diffusion.schedules import BETAS
from ddpm_jax.evaluation.metrics import METRICS
from ddpm_jax.evaluation.options import Options as EvaluationOptions
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.sampling import SAMPLERS, SPACINGS
from ddpm_jax.training.loop import Interrupted
from ddpm_jax.training.workdir import enter, read_config

ROOT = Path(__file__).parent.parent
DIGITS = "configs/digits.py"


def plain(text):
    """The words in a box, whether it is drawn with lines or, on a terminal that has none, without."""
    return " ".join(re.sub("[│─╭╮╰╯]|---+", " ", text).split())


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    """A wide terminal in the repository's root; what `cli.run` sets for its process is set back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    hook = sys.unraisablehook
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    levels = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    yield
    sys.unraisablehook = hook
    signal.set_wakeup_fd(-1)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as its command line would: (exit code, standard output, standard error)."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.run(name)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Checks that a command line ends with code 2 and just this sentence."""

    def refused(message, name, *arguments):
        assert run(name, *arguments) == (2, "", f"{name}.py: {message}\n")

    return refused


@pytest.fixture
def boxed(run):
    """The text of the one box that a command line which cannot be parsed is answered with."""

    def boxed(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.count("For full helptext") == 1
        assert "Arguments" not in err  # no name of ours that is not on the command line
        return plain(err)

    return boxed


# ---- Options


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--train.batchsize", "--train.batch-size INT Images per step"),
        ("--batch-size", "--train.batch-size INT Images per step"),
        ("--train.stesp", "--train.steps INT Last step"),
        ("--workdri", "--workdir FOLDER Folder that the run is written to"),
        ("--diffusion.shedule", "--diffusion.schedule {linear,quad,"),
    ],
)
def test_typo_is_answered_with_the_nearest_option(typo, meant, boxed, tmp_path):
    answer = boxed("train", DIGITS, "--workdir", tmp_path / "run", typo, "3")
    assert answer.startswith(f"Unrecognized options Unrecognized options: {typo}")
    assert meant in answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--train.steps", "many", "--train.steps INT"),
        ("--train.steps", "10.5", "--train.steps INT"),
        ("--train.lr", "fast", "--train.lr FLOAT"),
        ("--seed", "zero", "--seed INT"),
        (
            "--diffusion.schedule",
            "linaer",
            "'linear', 'quad', 'const', 'jsd', 'warmup10', 'warmup50', 'cosine', 'sigmoid'",
        ),
        ("--data.cache", "gpu", "'auto', 'device', 'host', 'none'"),
        ("--model.dtype", "float16", "'float32', 'bfloat16'"),
    ],
)
def test_wrong_value_is_answered_with_the_right_ones(option, value, expected, boxed, tmp_path):
    answer = boxed("train", DIGITS, "--workdir", tmp_path / "run", option, value)
    assert value in answer
    assert expected in answer


def test_option_without_its_value_is_refused(boxed, refused, tmp_path):
    assert "--workdir" in boxed("train", DIGITS, "--workdir")
    refused(
        "model.ch_mult is empty; give at least one number",
        "train",
        DIGITS,
        "--model.ch-mult",
        "--workdir",
        tmp_path / "run",
    )


def test_any_field_can_be_overridden(run, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(train, "train", lambda *given, **options: calls.append((given, options)))
    base = load_config(DIGITS)
    options = "--seed 3 --train.batch-size 64 --model.ch-mult 1 3 --train.lr 1e-4 --train.flip --model.dtype bfloat16"
    options += " --data.image-size 8 12 --data.value-range -1 1.5"
    assert run("train", DIGITS, "--workdir", tmp_path, *options.split()) == (0, "", "")
    assert run("train", DIGITS, "--workdir", tmp_path, "--train.no-flip", "--unverified") == (0, "", "")
    (((config, workdir), more), ((again, _), unverified)) = calls
    assert workdir == str(tmp_path)
    assert more == {"unverified": False, "changed_data": False}
    assert unverified == {"unverified": True, "changed_data": False}
    changed = {"seed": 3, "train.batch_size": 64, "model.ch_mult": (1, 3), "train.lr": 1e-4, "model.dtype": "bfloat16"}
    changed |= {"train.flip": True, "data.image_size": (8, 12), "data.value_range": (-1.0, 1.5)}
    assert configs.flatten(config.config) == configs.flatten(base) | changed
    assert configs.flatten(again.config) == configs.flatten(base) | {"train.flip": False}


def helps(*classes):
    """The help of every field: the text under it."""
    for section in (base for each in classes for base in each.__mro__[:-1]):
        for node in ast.walk(ast.parse(inspect.getsource(section))):
            if isinstance(node, ast.ClassDef):
                for field, text in zip(node.body, node.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                        yield section, field.target.id, text.value.value


def test_help_shows_every_field_with_its_text_and_this_configs_default(run):
    code, out, err = run("train", DIGITS, "--help")
    assert (code, err) == (0, "")
    out = plain(out)
    values = configs.flatten(load_config(DIGITS))
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        shown = "8-bit images" if name == "data.value_range" else shown
        entry = re.search(rf"{re.escape(option)}[ ,].*?\(default: (.*?)\)", out)
        assert entry, name
        assert entry.group(1) in (shown, f"'{shown}'"), name
    sections = [type(getattr(Config(), name)) for name in ("data", "model", "diffusion", "train")]
    texts = [*helps(Config, *sections, arguments.Train)]
    assert len(texts) == len(values) + 4
    for _, name, text in texts:
        assert " ".join(text.split()) in out, name


SECTIONS = {
    "train": [arguments.Train, DataConfig, ModelConfig, DiffusionConfig, TrainConfig],
    "sample": [arguments.Sample, SamplerOptions, arguments.Parameters],
    "evaluate": [arguments.Evaluate, EvaluationOptions, SamplerOptions, arguments.Parameters],
    "benchmark": [arguments.Benchmark, Plan, DataConfig, TrainConfig],
    "prepare_data": [arguments.PrepareData],
    "convert from-diffusers": [arguments.FromDiffusers],
    "convert from-tensorflow": [arguments.FromTensorflow],
    "convert to-diffusers": [arguments.ToDiffusers, arguments.Parameters],
    "convert export": [arguments.Export, arguments.Parameters],
    "convert inception": [arguments.Inception],
}
HIDDEN = ("The run, if one is measured.", "What another version is given for the config.")


@pytest.mark.parametrize("command", SECTIONS)
def test_help_without_anything_else_shows_every_option_in_readable_groups(command, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # one column of boxes
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert not re.search(r"None|options options|\[INT \[INT \.\.\.\]\]}", out)
    words = plain(out)
    texts = [text for _, _, text in helps(*SECTIONS[command]) if text not in HIDDEN]
    assert texts
    for text in texts:
        assert " ".join(text.split()) in words, text


def test_help_offers_what_the_tables_have(run):
    names = {"--sampler": SAMPLERS, "--spacing": SPACINGS, "--metrics": METRICS}
    names |= {"--diffusion.schedule": BETAS, "--diffusion.loss": LOSSES}
    helps = plain(" ".join(run(name, "--help")[1] for name in ("sample", "evaluate", "train")))
    for option, table in names.items():
        assert re.search(re.escape(option) + r" \[?\{" + re.escape(",".join(map(str, table))) + r"\}", helps), option


def test_an_animation_is_webp_unless_gif_is_asked_for():
    for words, expected in (([], "none"), (["--animation"], "webp"), (["--animation", "gif"], "gif")):
        assert arguments.sample(["runs/digits", *words]).animation == expected


def test_train_without_a_config_says_how_it_is_called(refused):
    for words in ([], ["--workdir", "runs/x"]):
        refused(
            "no config was given; run train.py CONFIG-or-PICTURES, and train.py --help for the options", "train", *words
        )


# ---- Config files


def test_missing_config_is_answered_with_the_nearest(refused, tmp_path, monkeypatch):
    refused(
        "the config configs/digit.py does not exist; perhaps you meant configs/digits.py", "train", "configs/digit.py"
    )
    refused("the config digits.py does not exist; perhaps you meant digits", "train", "digits.py")
    there = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
    refused(
        f"there is no file or folder /0/1, and no config of that name; give a file, or one of {there}",
        "train",
        "/0/1",
        "--help",
    )
    refused("there is no file or folder foldr, and no config of that name; perhaps you meant folder", "train", "foldr")
    monkeypatch.chdir(tmp_path)
    refused("the config configs/digits.py does not exist; perhaps you meant digits", "train", DIGITS)
    (tmp_path / "mine.py").write_text("")
    refused("the config mime.py does not exist; perhaps you meant mine.py", "train", "mime.py")


def test_shipped_config_is_found_by_its_name_in_every_folder(tmp_path, monkeypatch):
    shipped = load_config(DIGITS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.py").write_text(WITH + "config = Config(seed=7)")
    (tmp_path / "digits").mkdir()
    assert load_config("digits") == shipped
    assert load_config("digits.py").seed == 7


WITH = "from ddpm_jax.config import Config, DataConfig, ModelConfig, TrainConfig\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "does not define `config = Config(...)`"),
        ("config = {}", "does not define `config = Config(...)`"),
        (WITH + "config = Config", "does not define `config = Config(...)`"),
        (WITH + "Config(seed=1)", "does not define `config = Config(...)`"),
        ("config = 1 / 0", "cannot be executed (ZeroDivisionError: division by zero)"),
        ("import no_such_module", "cannot be executed (ModuleNotFoundError: No module named 'no_such_module')"),
        (
            WITH + "config = Config(train=TrainConfig(colour=3))",
            "cannot be executed (TypeError: TrainConfig.__init__() got an unexpected keyword argument 'colour')",
        ),
    ],
)
def test_file_that_gives_no_config_is_refused(source, message, refused, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(source)
    refused(f"the config {path} {message}", "train", path, "--workdir", tmp_path / "run")


def test_file_with_a_syntax_error_is_refused(run, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("config = Config(")
    code, out, err = run("train", path)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"train\.py: the config {path} cannot be executed \(SyntaxError: .*line 1\)\)\n", err)


def test_file_that_is_not_python_is_refused(refused, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{}")
    refused(
        f"the config {path} is not a Python file; give NAME.py, or a name that ddpm-jax configs lists", "train", path
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("train=TrainConfig(steps='10')", "train.steps='10' is not a whole number"),
        ("model=ModelConfig(ch_mult=[1, 2])", "model.ch_mult=[1, 2] is not a tuple of whole numbers"),
        ("data=None", "data=None is not a DataConfig"),
    ],
)
def test_wrong_type_in_a_config_file_is_refused(code, message, refused, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"{WITH}config = Config({code})")
    refused(message, "train", path, "--workdir", tmp_path / "run")


def test_config_that_cannot_be_run_leaves_nothing_behind(refused, tmp_path):
    message = "train.batch_size=100 is not divisible by the 8 devices; use 96 or 104"
    refused(message, "train", DIGITS, "--workdir", tmp_path / "run", "--train.batch-size", 100)
    kinds = "digits, tfds:NAME, .npy, .npz, .gz, .zip, a folder (endings stand for a file's path)"
    message = f"data.source='x.npy' does not exist; use one of {kinds}"
    refused(message, "train", DIGITS, "--workdir", tmp_path / "run", "--data.source", "x.npy")
    assert list(tmp_path.iterdir()) == []


# ---- Workdirs


def test_train_without_a_workdir_is_refused(refused):
    refused("no workdir was given; add --workdir runs/NAME", "train", DIGITS)


def test_workdir_that_is_a_file_is_refused(refused, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    refused(f"the workdir {path} is a file; choose another path", "train", DIGITS, "--workdir", path)
    refused(f"{path} is a file; give the folder of a run that train.py made", "sample", path)
    assert path.read_text() == "mine"


def test_workdir_below_a_file_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, err = run("train", DIGITS, "--workdir", tmp_path / "file/run")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"train\.py: the workdir .*/file/run cannot be written \(.*\); choose another path\n", err)


def test_workdir_of_another_config_is_refused_with_the_fields(refused, tmp_path):
    config = load_config(DIGITS)
    enter(epath.Path(tmp_path), config)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    before = (tmp_path / "config.json").read_text()
    refused(
        f"the workdir {tmp_path} belongs to another config, which differs in seed (there {config.seed}, here 5), "
        f"model.ch_mult (there {config.model.ch_mult}, here (1, 3)), train.lr (there {config.train.lr}, here 0.1); "
        "choose another workdir",
        *("train", DIGITS, "--workdir", tmp_path, "--train.lr", 0.1, "--model.ch-mult", 1, 3, "--seed", 5),
        *("--train.steps", 5000),  # may change, and is not named
    )
    assert (tmp_path / "config.json").read_text() == before


def test_workdir_takes_what_may_change(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    old = Config(data=DataConfig(condition="paired"))
    enter(workdir, old)
    assert read_config(workdir) == old
    values = configs.to_json(old)
    for name in changeable():
        section, field = name.split(".")
        texts = {"cache": "host", "on_bad_image": "skip", "source": "mine.npy"}
        texts |= {"condition_source": "theirs.npy", "eval_condition_source": "others.npy"}
        texts |= {"eval_source": "other.npy", "eval_features": "pixels", "keep_best": "eval_fid"}
        values[section][field] = texts.get(field, field == "remat" or 4)
    new = configs.from_json(values)
    assert set(configs.differences(old, new)) == changeable()
    enter(workdir, new)
    assert read_config(workdir) == new
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    enter(workdir, new)
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"differs in seed \(there 0, here 1\); choose another workdir$"):
        enter(workdir, configs.from_json(values | {"seed": 1}))


def test_workdir_without_a_checkpoint_takes_a_corrected_config(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    enter(workdir, Config())
    corrected = dataclasses.replace(Config(), seed=1)
    enter(workdir, corrected)
    assert read_config(workdir) == corrected


def test_workdir_that_was_killed_while_its_config_was_written_is_taken(tmp_path):
    (tmp_path / "config.json.123.tmp").write_text('{"see')
    enter(epath.Path(tmp_path), Config())
    assert read_config(epath.Path(tmp_path)) == Config()


def test_workdir_with_other_files_is_refused(refused, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    refused(
        f"the workdir {tmp_path} has files but no config.json; choose an empty or a new folder",
        *("train", DIGITS, "--workdir", tmp_path),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_sampling_needs_a_run(refused, tmp_path):
    missing, empty, begun = (tmp_path / name for name in ("missing", "empty", "begun"))
    give = "give the folder of a run that train.py made"
    refused(f"{missing} does not exist; {give}", "sample", missing)
    empty.mkdir()
    refused(f"{empty} has no config.json; {give}", "sample", empty)
    enter(epath.Path(begun), load_config(DIGITS))
    refused(f"{begun} has no checkpoint yet; train longer, or give another workdir", "sample", begun)
    refused(f"{begun}/checkpoints has no checkpoint of step 5; there are none", "sample", begun, "--step", 5)
    refused(f"{begun} has no eval_loss yet; set train.eval_every, or give a step", "sample", begun, "--step", "best")
    assert [path.name for path in begun.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "a JSON list"),
        ("[" * 100_000, "nested too deep"),
        ('{"seed": NaN}', "NaN"),
        ('{"sead": 1}', "sead is not a field of this version of ddpm_jax"),
        ('{"seed": "1"}', "seed='1' is not a whole number"),
        ('{"train": 3}', "train is int"),
        ('{"model": {"ch_mult": [[1]]}}', "model.ch_mult="),
        ('{"model": {"groups": 0}}', "model.groups=0 is too small"),
        ('{"model": {"groups": 3}}', "model.groups=3 does not divide"),
        ('{"diffusion": {"T": -1}}', "diffusion.T=-1 is too small"),
        ('{"diffusion": {"beta_end": 1e999}}', "beta_end"),
        ('{"diffusion": {"beta_end": 1' + "0" * 400 + "}}", "beta_end"),
    ],
)
def test_broken_config_of_a_workdir_is_refused(text, reason, run, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    for command in (("sample", tmp_path), ("train", DIGITS, "--workdir", tmp_path), ("evaluate", tmp_path)):
        code, out, err = run(*command)
        assert (code, out) == (2, "")
        assert str(path) in err
        assert reason in err
        assert "restore it from a copy" in err
        assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("gs://bucket/run", "pip install gcsfs"),
        ("s3://bucket/run", "pip install s3fs"),
        ("az://bucket/run", "use a local folder"),
        ("foo://bucket/run", "use a local folder, or one of gs://, s3://"),
    ],
)
def test_a_workdir_on_a_storage_that_cannot_be_reached_is_refused(path, remedy, run, monkeypatch):
    for module in ("gcsfs", "s3fs", "adlfs", "tensorflow"):
        monkeypatch.setitem(sys.modules, module, None)  # not installed
    for command in (
        ("train", DIGITS, "--workdir", path),
        ("sample", path),
        ("evaluate", path),
        ("convert", "to-diffusers", path, "/nowhere/model"),
        ("convert", "from-diffusers", "/nowhere/model", path),
    ):
        code, out, err = run(*command)
        assert (code, out) == (2, ""), err
        assert path in err
        assert remedy in err
        assert err.count("\n") == 1


def test_wrong_options_of_sample_are_refused(refused, boxed, tmp_path):
    refused("--num-images 0 is too small; use 1 or more", "sample", tmp_path, "--num-images", 0)
    refused("--batch-size -1 is too small; use 1 or more", "sample", tmp_path, "--batch-size", -1)
    refused("--seed -1 is too small; use 0 or more", "sample", tmp_path, "--seed", -1)
    refused("--seed 4294967296 is too large; use 4294967295 or less", "sample", tmp_path, "--seed", 2**32)
    beyond = "--first-image and --num-images go beyond image 2000000000; choose smaller ones"
    refused(beyond, "sample", tmp_path, "--first-image", 2 * 10**9)
    assert "--num-images INT Number of images" in boxed("sample", tmp_path, "--num-image", 3)
    weights = "got weights 'best', expected ema, raw, ema:DECAY or width:WIDTH, such as ema:0.999"
    assert weights in boxed("sample", tmp_path, "--weights", "best")


# ---- How a script ends


def test_failures_end_with_their_code_and_one_sentence(run, monkeypatch):
    full = "the disk is full; earlier saves are intact: make room and run the same command again"
    for error, code, message in (
        (UsageError("do that"), 2, "do that"),
        (RunError("it broke"), 1, "it broke"),
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), 1, full),
    ):

        def fail(_, error=error):
            raise error

        monkeypatch.setattr("ddpm_jax.commands.train.main", fail)
        assert run("train", DIGITS, "--workdir", "w") == (code, "", f"train.py: {message}\n")


def test_what_nobody_foresaw_keeps_its_stack(run, monkeypatch):
    def fail(_):
        raise ZeroDivisionError

    monkeypatch.setattr("ddpm_jax.commands.train.main", fail)
    with pytest.raises(ZeroDivisionError):
        run("train", DIGITS, "--workdir", "w")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR])
def test_what_the_system_refuses_is_told_with_its_path(number, run, monkeypatch):
    def fail(_):
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    monkeypatch.setattr("ddpm_jax.commands.train.main", fail)
    code, out, err = run("train", DIGITS, "--workdir", "w")
    assert (code, out) == (1, "")
    assert f"runs/a/metrics.jsonl: {os.strerror(number)}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nstack")]
)
def test_memory_that_is_full_is_told_with_what_to_do(error, run, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr("ddpm_jax.commands.train.main", fail)
    code, out, err = run("train", DIGITS, "--workdir", "w")
    assert (code, out) == (1, "")
    assert "memory is full" in err
    assert "use a smaller batch" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("missing", ["tensorboardX", "tensorboardX.summary"])
def test_a_package_that_is_not_installed_is_named(missing, run, monkeypatch):
    """A module of this package that is missing is a bug, and keeps its stack."""

    def fail(_):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("ddpm_jax.commands.train.main", fail)
    code, out, err = run("train", DIGITS, "--workdir", "w")
    assert (code, out) == (1, "")
    assert (
        err
        == "train.py: the Python package tensorboardX is needed and is not installed; install what ddpm-jax depends on\n"
    )
    missing = "ddpm_jax.gone"
    with pytest.raises(ModuleNotFoundError):
        run("train", DIGITS, "--workdir", "w")


def test_closed_event_loops_alone_are_hushed(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    cli.run(lambda: None)
    for message in ("Event loop is closed", "something else"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(message)))
    assert [str(unraisable.exc_value) for unraisable in told] == ["something else"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_training_says_how_to_continue(signum, run, monkeypatch, tmp_path):
    def stopped(*_, **__):
        raise Interrupted(signum, 30)

    monkeypatch.setattr("ddpm_jax.commands.train.train", stopped)
    code, out, err = run("train", DIGITS, "--workdir", tmp_path / "run")
    assert (code, out) == (128 + signum, "")
    sentence = f"{signum.name}: stopped at step 30, which is saved; the same command continues from there."
    assert err.strip() == sentence


def test_script_ends_so_as_a_process():
    done = subprocess.run([sys.executable, "train.py", "configs/digist.py"], capture_output=True, text=True, cwd=ROOT)
    message = "train.py: the config configs/digist.py does not exist; perhaps you meant configs/digits.py\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


# ---- The console command


def console(*words):
    """What `ddpm-jax` does with these words: (exit code, standard output, standard error)."""
    code = "import sys; sys.argv[0] = 'bin/ddpm-jax'; from ddpm_jax.commands.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_console_command_runs_each_command_as_its_script_does():
    script = subprocess.run([sys.executable, "prepare_data.py", "cifar10"], capture_output=True, text=True, cwd=ROOT)
    code, out, err = console("prepare-data", "cifar10")
    assert (code, out) == (script.returncode, script.stdout) == (2, "")
    assert err == script.stderr.replace("prepare_data.py", "ddpm-jax prepare-data", 1)
    code, out, _ = console("sample", "--help")
    assert code == 0
    assert out.startswith("usage: ddpm-jax sample [-h]")


def test_resolved_config_of_a_workdir_is_json(tmp_path):
    enter(epath.Path(tmp_path / "new/run"), load_config(DIGITS))
    values = json.loads((tmp_path / "new/run/config.json").read_text())
    assert values == json.loads(json.dumps(configs.to_json(load_config(DIGITS))))
