"""The training loop in one process: what it refuses, what it stops at, what it goes on from."""

import contextlib
import dataclasses
import errno
import io
import os
import shutil
import subprocess
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tiny import experiment, tiny

from ddpm_jax.commands import train as command
from ddpm_jax.commands.train import train
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.data import open_source
from ddpm_jax.data.sheets import enlarge, grid
from ddpm_jax.evaluation.evaluation import Programs
from ddpm_jax.evaluation.evaluators import TERMS, HeldOut, open_held_out
from ddpm_jax.generation.generator import make_generator, sample_key
from ddpm_jax.training import step as training
from ddpm_jax.training.checkpoint import Checkpoints, manifest_digest
from ddpm_jax.training.loop import Log, Losses
from ddpm_jax.training.metric_writer import MetricWriter, read_metrics
from ddpm_jax.training.start import describe_origin, start_state
from ddpm_jax.training.workdir import Run, held, load_run

# What other tests of resuming leave out: a history of losses, data fed by the host, grids and evaluations.
CONFIG = tiny(
    data={"cache": "host"},
    model={"ch_mult": (1,), "attn_resolutions": (8,)},
    diffusion={"t_sampler": "loss_history"},
    train={
        "steps": 8,
        "lr": 3e-3,
        "warmup_steps": 0,
        "log_every": 4,
        "save_every": 4,
        "sample_every": 4,
        "num_samples": 2,
        "eval_every": 4,
        "eval_source": "digits",
        "eval_images": 10,
        "eval_samples": 4,
        "eval_features": "pixels",
        "fsdp": 8,
    },
)


def changed(**train_fields):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **train_fields))


@pytest.fixture(scope="module")
def finished_and_shown(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        state = jax.device_get(train(experiment(CONFIG), workdir))
    return workdir, state, shown.getvalue()


@pytest.fixture(scope="module")
def finished(finished_and_shown):
    return finished_and_shown[:2]


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines_without_rates(workdir):
    return [line.split(', "steps_per_s"')[0] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_two_parts_ends_bit_identical_with_a_loss_history_and_host_fed_data(finished, tmp_path):
    workdir, state = finished
    train(experiment(changed(steps=4)), tmp_path / "w")
    parts = jax.device_get(train(experiment(CONFIG), tmp_path / "w"))
    assert jax.tree.structure(parts) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert lines_without_rates(tmp_path / "w") == lines_without_rates(workdir)
    assert files(tmp_path / "w" / "samples") == files(workdir / "samples")


@pytest.mark.slow
def test_a_grid_that_was_lost_between_the_save_and_the_stop_is_made_up_for(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "w")
    (tmp_path / "w" / "samples" / "step_00000008.png").unlink()
    train(experiment(CONFIG), tmp_path / "w")
    assert files(tmp_path / "w" / "samples") == files(workdir / "samples")


@pytest.mark.slow
def test_samples_and_evaluations_are_of_the_moving_average(finished):
    """load_run gives the EMA unless told otherwise; evaluations and the grid's left half are by it."""
    workdir, state = finished
    ema, raw = (load_run(workdir, weights=weights).params for weights in ("ema", "raw"))
    for a, b, c in zip(*map(jax.tree.leaves, (ema, state.ema_params, raw)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
    for a, b in zip(*map(jax.tree.leaves, (raw, state.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    mesh, source, generator = (
        sharding.make_mesh(),
        open_source(CONFIG.data),
        make_generator(experiment(CONFIG), sharding.make_mesh()),
    )
    evaluator = HeldOut(Programs(experiment(CONFIG), mesh, terms=TERMS), source, open_held_out(experiment(CONFIG)))

    def measure(params):
        return evaluator(dataclasses.replace(state, ema_params=params)).numbers

    logged = [line for line in read_metrics(workdir) if "eval_loss" in line][-1]
    assert logged["eval_loss"] == pytest.approx(measure(ema)["eval_loss"], rel=1e-5)
    assert logged["eval_loss"] != pytest.approx(measure(raw)["eval_loss"], rel=1e-4)
    images = np.asarray(generator(ema, sample_key(CONFIG.seed), np.arange(8, dtype=np.int32)))[:2]
    sheet = np.asarray(Image.open(workdir / "samples" / "step_00000008.png"), int)
    left = enlarge(grid(images))[..., 0]
    assert np.abs(sheet[:, : left.shape[1]] - left).max() <= 1


def test_another_data_set_is_refused(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "w")
    before = files(tmp_path / "w")
    real = command.open_source
    monkeypatch.setattr(command, "open_source", lambda c: dataclasses.replace(real(c), identity={"images": 3}))
    with pytest.raises(UsageError, match=r"the data set has changed since the checkpoint of step 8"):
        train(experiment(changed(steps=12)), tmp_path / "w")
    assert files(tmp_path / "w") == before | {"config.json": (tmp_path / "w" / "config.json").read_bytes()}


def test_steps_per_dispatch_must_divide_the_step_a_run_stands_at(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "w")
    with pytest.raises(UsageError, match=r"stands at step 8, which is not a multiple of train\.steps_per_dispatch=3"):
        train(
            experiment(
                changed(steps=12, steps_per_dispatch=3, log_every=3, save_every=3, sample_every=3, eval_every=0)
            ),
            tmp_path / "w",
        )


def test_init_from_starts_with_the_other_runs_moving_average(finished, tmp_path, capsys):
    workdir, state = finished
    config, mesh = changed(init_from=str(workdir)), sharding.make_mesh(fsdp=8)
    source = open_source(config.data)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    start, meta = start_state(experiment(config), source, mesh, checkpoints, unverified=False)
    checkpoints.close()
    assert start.step == 0
    digest = manifest_digest(epath.Path(workdir / "checkpoints/8"))
    assert meta["init_from"] == {"step": 8, "checkpoint": digest, "weights": "ema"}
    said = capsys.readouterr().out
    assert f"Starting from step 8 of {workdir} (ema).\nNote: 43% of the EMA at step 8 is still the initial" in said
    assert "trained for something else" not in said
    for params in (start.params, start.ema_params):
        for a, b in zip(*map(jax.tree.leaves, (params, state.ema_params)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(not np.any(a) for a in jax.tree.leaves(jax.device_get(start.opt_state)))


def test_what_the_other_run_was_trained_for_instead_is_told():
    theirs = tiny(data={"condition": "downsample2"}, diffusion={"schedule": "cosine"}, train={"lr": 1.0})
    run = Run(experiment(theirs), 0, "", "ema", {}, sharding.make_mesh(), classes=("cat", "dog", "owl"))
    said = describe_origin(tiny(data={"value_range": (0.0, 1.0)}), ("cat", "owl", "dog"), run, "runs/x")
    assert said.endswith(
        "Note: its parameters were trained for something else: data.value_range (there None, here (0.0, 1.0)), "
        "data.condition (there 'downsample2', here 'none'), diffusion.schedule (there 'cosine', here 'linear'), "
        "class 1 (there 'dog', here 'owl')."
    )
    assert "Note" not in describe_origin(theirs, (), run, "runs/x")


@pytest.mark.slow
def test_a_wrong_init_from_is_told_and_can_be_put_right(finished, tmp_path):
    """Before its first checkpoint a workdir takes a corrected config."""
    workdir, _ = finished
    with pytest.raises(UsageError, match="does not exist"):
        train(experiment(changed(init_from=str(tmp_path / "typo"))), tmp_path / "w")
    wider = dataclasses.replace(changed(init_from=str(workdir)), model=dataclasses.replace(CONFIG.model, ch=16))
    with pytest.raises(UsageError, match=r"do not fit this network: .* has shape"):
        train(experiment(wider), tmp_path / "w")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "w")
    before = files(tmp_path / "w" / "checkpoints")
    make = training.make_train_step

    def broken(config, *, mesh):
        step = make(config, mesh=mesh)

        def go(state, *feed):
            state, metrics = step(state, *feed)
            return state, metrics | {"loss": jnp.where(state.step >= 12, jnp.nan, metrics["loss"])}

        return go

    monkeypatch.setattr(command, "make_train_step", broken)
    with pytest.raises(RunError, match="loss became nan between steps 11 and 12; the checkpoints before are kept"):
        train(
            experiment(changed(steps=16, save_every=16, log_every=16, sample_every=16, eval_every=0)),
            tmp_path / "w",
        )
    assert files(tmp_path / "w" / "checkpoints") == before


# ---- What happens to the workdir meanwhile

# Four steps more than `finished`, with a log line and a checkpoint at the end alone.
LONGER = changed(steps=12, sample_every=0, eval_every=0)


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of the finished run, to damage and go on from."""
    return shutil.copytree(finished[0], tmp_path / "w")


def test_a_second_training_is_refused_at_once_and_touches_nothing(workdir, monkeypatch):
    monkeypatch.setattr(command, "open_source", None)  # before any picture is read
    with held(epath.Path(workdir)):
        before = files(workdir)
        with pytest.raises(UsageError, match=rf"is being written by process {os.getpid()} on "):
            train(experiment(LONGER), workdir)
        assert files(workdir) == before


def test_a_config_that_was_changed_on_both_sides_is_refused_by_the_checkpoint(workdir):
    path = workdir / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.003', '"lr": 0.1'))
    with pytest.raises(UsageError, match=r"train\.lr \(checkpoint 0\.003, config\.json 0\.1\)"):
        train(experiment(changed(steps=12, lr=0.1)), workdir)


@pytest.mark.slow
def test_damaged_logs_and_remnants_do_not_keep_a_run_from_going_on(workdir, capsys):
    intact = (workdir / "metrics.jsonl").read_bytes()
    (workdir / "metrics.jsonl").write_bytes(b"\xff\n" + intact + bytes(100) + b"\n[1]\n")
    (events,) = (workdir / "events").iterdir()
    content = bytearray(events.read_bytes())
    content[-20] ^= 1
    events.write_bytes(content)
    for name in ("4.deleting.tmp", "9.saving.tmp", "9.saving.tmp.orbax-checkpoint-tmp"):
        (workdir / "checkpoints" / name).mkdir()
    train(experiment(LONGER), workdir)
    told = capsys.readouterr().out
    assert f"Note: {workdir}/metrics.jsonl had 3 damaged lines" in told
    assert f"Note: {workdir}/events had 1 damaged records" in told
    assert (workdir / "metrics.jsonl").read_bytes().startswith(intact)
    assert [line["step"] for line in read_metrics(workdir)][-2:] == [8, 12]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "8"]
    assert not (workdir / "lock").exists()


def test_a_workdir_that_is_deleted_while_it_is_trained_ends_the_run_with_an_error(workdir, monkeypatch):
    log = MetricWriter.write
    monkeypatch.setattr(MetricWriter, "write", lambda *a: (log(*a), shutil.rmtree(workdir)))
    with pytest.raises(RunError, match="was deleted or moved while it was trained"):
        train(experiment(LONGER), workdir)
    assert not workdir.exists()  # nor made anew


@pytest.mark.slow
def test_a_workdir_that_is_deleted_with_the_last_checkpoint_ends_the_run_with_an_error(workdir, monkeypatch):
    wait = Checkpoints.wait

    def wait_and_delete(checkpoints):
        if checkpoints._pending is not None:
            wait(checkpoints)
            shutil.rmtree(workdir)

    monkeypatch.setattr(Checkpoints, "wait", wait_and_delete)
    with pytest.raises(RunError, match="was deleted or moved while it was trained"):
        train(experiment(LONGER), workdir)


def test_a_log_that_cannot_be_written_ends_the_run_and_costs_no_checkpoint(workdir, monkeypatch):
    before = files(workdir / "checkpoints")

    def io_error(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(MetricWriter, "write", io_error)
    with pytest.raises(OSError, match="Input/output error"):  # which the scripts tell in a sentence, with code 1
        train(experiment(LONGER), workdir)
    assert files(workdir / "checkpoints") == before


def test_a_read_only_disk_is_told_before_anything_is_read(finished, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        workdir = shutil.copytree(finished[0], disk / "w")
        subprocess.run([mount, "-o", "remount,ro", disk], check=True)
        monkeypatch.setattr(command, "open_source", None)
        with pytest.raises(OSError, match="Read-only file system"):
            train(experiment(LONGER), workdir)
        with pytest.raises(UsageError, match=r"cannot be written .*; choose another path"):
            train(experiment(LONGER), disk / "new")
        assert load_run(workdir).step == 8
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_are_checked_before_anything_is_saved(bad):
    losses = Losses(10, {})
    for values in ([1.0, 2.0], [3.0, bad]):
        losses.add({"loss": jnp.asarray(values), "grad_norm": jnp.ones(2)})
    with pytest.raises(RunError, match=f"loss became {bad} between steps 13 and 14"):
        losses.fetch_all()


def test_logged_values_are_means_since_the_last_line():
    losses = Losses(0, {"loss": [5.0]})
    losses.add({"loss": jnp.asarray([1.0, 3.0])})
    assert losses.means() == {"loss": 3.0}
    losses.add({"loss": jnp.asarray([4.0])})
    assert losses.means() == {"loss": 4.0}
    assert losses.step == 3


# ---- The progress bar


def test_the_bar_says_what_is_done_while_no_step_is_taken(finished_and_shown):
    shown = finished_and_shown[2]
    places = [shown.find(what) for what in ("compiling the step", "drawing the grid", "evaluating held-out images")]
    assert -1 not in places
    assert places == sorted(places)
    assert shown.count("compiling the step") == 1
    assert "loss " in shown[shown.rfind("\r") :]  # what it said before is there again


@pytest.mark.parametrize("told", [True, False])
def test_what_the_bar_names_is_left_out_of_the_time_left(told, monkeypatch):
    """A second for each step, and once 1000 s for something else: the bar still expects a second for each step."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    parts = SimpleNamespace(writer=object(), learning_rate=None)
    log = Log(changed(steps=100).train, parts, 0, {})
    for step in range(30):
        if step == 20:
            with log.doing("drawing the grid") if told else contextlib.nullcontext():
                now[0] += 1000
        now[0] += 1
        log.bar.update(1)
        log.bar.refresh()
    rate = log.bar.format_dict["rate"]
    assert (rate == pytest.approx(1, rel=0.05)) is told
    log.bar.close()
