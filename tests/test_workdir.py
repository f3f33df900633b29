"""The workdir: held by one training, its config proven by its checkpoints, its end noticed."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest
from etils import epath
from tiny import experiment, tiny

from ddpm_jax import train
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.core.files import LOCK
from ddpm_jax.training.checkpoint import KEPT, MANIFEST
from ddpm_jax.training.metric_writer import METRICS
from ddpm_jax.training.step import init_state
from ddpm_jax.training.workdir import CHECKPOINTS, check_there, enter, held, load_run, write_run

CONFIG = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The text of a workdir's config.json, and the workdir."""
    workdir = tmp_path_factory.mktemp("made") / "run"
    write_run(workdir, experiment(CONFIG), init_state(experiment(CONFIG), jax.random.key(0)))
    return (workdir / "config.json").read_text(), workdir


@pytest.fixture
def change(made):
    """Sets a field of the workdir's config.json, for one test."""
    text, workdir = made

    def change(section, field, value):
        values = json.loads(text)
        values[section][field] = value
        (workdir / "config.json").write_text(json.dumps(values))
        return workdir

    yield change
    (workdir / "config.json").write_text(text)


# ---- The config


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("diffusion", "beta_end", 0.3),
        ("diffusion", "prediction", "v"),
        ("diffusion", "schedule", "cosine"),
        ("model", "ch", 16),
        ("model", "dropout", 0.5),
        ("data", "channels", 3),
    ],
)
def test_a_config_that_was_changed_is_refused_with_its_field(section, field, value, change):
    workdir = change(section, field, value)
    with pytest.raises(UsageError) as raised:
        load_run(workdir)
    assert f"{section}.{field} (checkpoint " in str(raised.value)
    assert f"config.json {value!r})" in str(raised.value)


def test_a_config_that_was_changed_is_taken_where_one_insists(change):
    assert load_run(change("diffusion", "beta_end", 0.3), unverified=True).config.diffusion.beta_end == 0.3


def test_what_may_change_is_taken(change):
    assert load_run(change("train", "steps", 10**6)).step == 0


# ---- Options that an earlier command was given


def with_steps(workdir, **train):
    """A workdir of this config that was evaluated at six steps, best at 20; its checkpoints are no more than their manifests."""
    config = tiny(train=train)
    enter(workdir, config)
    for step in range(10, 70, 10):
        (workdir / CHECKPOINTS / str(step)).mkdir(parents=True)
        (workdir / CHECKPOINTS / str(step) / MANIFEST).touch()
    lines = [{"step": step, "eval_loss": abs(step - 20), "eval_fid": step} for step in range(10, 70, 10)]
    (workdir / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        ({"keep_last": 3}, {}, [40, 50, 60]),
        ({"keep_last": 3, "keep_every": 20}, {"keep_last": 4}, [20, 40, 60]),
        ({"keep_every": 20}, {"keep_every": 30}, [20, 40, 60]),
        ({"keep_every": 20}, {"keep_every": 10}, []),
        ({"keep_last": 2}, {"keep_last": 5}, []),
        ({}, {"keep_best": "eval_fid"}, [20]),
        ({"keep_last": 3}, {"keep_last": 3, "steps": 80}, []),
    ],
)
def test_a_command_with_other_options_costs_no_checkpoint_that_an_earlier_one_keeps(
    before, now, kept, tmp_path, capsys
):
    workdir = epath.Path(tmp_path)
    with_steps(workdir, **before)
    enter(workdir, tiny(train=now))
    assert sorted(int(path.parent.name) for path in tmp_path.glob(f"{CHECKPOINTS}/*/{KEPT}")) == kept
    said = capsys.readouterr().out
    assert said.count("Note: the checkpoints of the steps") == bool(kept)
    assert ", ".join(map(str, kept)) in said
    assert "goes on with other options" in said


def test_options_that_change_are_told_and_the_same_ones_are_not(tmp_path, capsys):
    enter(epath.Path(tmp_path) / "begun", tiny(model={"ch": 16}))
    enter(epath.Path(tmp_path) / "begun", tiny())  # without a checkpoint nothing goes on
    config = with_steps(epath.Path(tmp_path) / "run", keep_last=3)
    tmp_path /= "run"
    enter(epath.Path(tmp_path), config)
    assert capsys.readouterr().out == ""
    enter(epath.Path(tmp_path), tiny(train={"log_every": 10}))
    assert "other options than before: train.log_every 4 -> 10, train.keep_last 3 -> 2.\n" in capsys.readouterr().out


def test_processes_are_compared_by_the_whole_command(tmp_path, monkeypatch):
    def compare(facts):
        raise UsageError(repr(facts))

    monkeypatch.setattr(sharding, "check_same", compare)
    with pytest.raises(UsageError) as compared:
        train(experiment(tiny()), tmp_path / "run", changed_data=True)
    for fact in (
        f"'--workdir': '{tmp_path / 'run'}'",
        "'--changed-data': True",
        "'--unverified': False",
        "'train.lr': ",
    ):
        assert fact in str(compared.value)
    assert "data.source" not in str(compared.value)  # hosts may call it otherwise


# ---- One training at a time


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the workdir until it is killed."""
    program = (
        "import time; from etils import epath; from ddpm_jax.training.workdir import held\n"
        f"with held(epath.Path({str(tmp_path / 'run')!r})): print('held', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_until_the_first_is_killed(other_process, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(UsageError) as raised, held(workdir):
        pytest.fail("held twice")
    assert f"process {other_process.pid} on {socket.gethostname()}" in str(raised.value)
    assert [path.name for path in workdir.iterdir()] == [LOCK]
    other_process.kill()
    other_process.wait()
    assert (workdir / LOCK).exists()  # left behind, and in nobody's way
    with held(workdir):
        enter(workdir, CONFIG)
        assert str(os.getpid()) in (workdir / LOCK).read_text()
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_lock_that_was_left_behind_is_no_reason_to_refuse_a_folder(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on mars")
    enter(epath.Path(tmp_path), CONFIG)


def test_what_killed_processes_left_half_written_goes_and_what_others_write_stays(tmp_path):
    for name in ("config.json.7.tmp", "metrics.jsonl.7.tmp", "report.html.7.tmp"):
        (tmp_path / name).write_text("half")
    with held(epath.Path(tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["report.html.7.tmp"]


def test_a_workdir_that_nothing_was_written_to_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), held(epath.Path(tmp_path / "a/run")):
        raise ZeroDivisionError
    assert not (tmp_path / "a/run").exists()


def test_a_workdir_that_is_gone_is_told(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    enter(workdir, CONFIG)
    check_there(workdir)
    workdir.rename(tmp_path / "moved")
    with pytest.raises(RunError, match=r"run or its config\.json was deleted or moved .*; put it back"):
        check_there(workdir)


def test_checkpoints_alone_are_no_workdir(made):
    """`write_run` writes the config last."""
    assert {path.name for path in made[1].iterdir()} == {"config.json", CHECKPOINTS}
