"""Further averages of a run: other decays, power-function widths, their snapshots, and any width rebuilt from these."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import linen as nn
from interop import convert, drawn
from tiny import read_images, tiny

from ddpm_jax.commands import arguments, evaluate, sample
from ddpm_jax.commands.train import train
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import DamagedFileError
from ddpm_jax.evaluation.results import made_of, read_results
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.metric_writer import cut_metrics, read_metrics
from ddpm_jax.training.parameters import flatten
from ddpm_jax.training.snapshots import SNAPSHOTS, Snapshots, make_snapshots, read_snapshot, snapshot_steps
from ddpm_jax.training.start import start_state
from ddpm_jax.training.step import TrainState, init_state, state_from_params
from ddpm_jax.training.weights import canonical
from ddpm_jax.training.workdir import load_run, write_run

SHORT = {"steps": 40, "warmup_steps": 0, "log_every": 20, "save_every": 40, "steps_per_dispatch": 2, "lr": 3e-3}
PLAIN = tiny(diffusion={"T": 10}, train=SHORT | {"ema_decay": 0.5})


class Small(nn.Module):
    """A network of few arrays, which are quick to save."""

    @nn.compact
    def __call__(self, x_t, t):
        noise = jnp.broadcast_to(t.astype(jnp.float32)[:, None] / 10, (x_t.shape[0], 1))
        h = nn.Dense(8)(jnp.concatenate([x_t.reshape(x_t.shape[0], -1), noise], axis=-1))
        return nn.Dense(x_t[0].size)(nn.silu(h)).reshape(x_t.shape)


def experiment(config):
    return Experiment.from_config(config, network=Small())


def load(workdir, **options):
    return load_run(workdir, network=Small(), **options)


def with_averages(**fields):
    return dataclasses.replace(PLAIN, train=dataclasses.replace(PLAIN.train, **fields))


CONFIG = with_averages(save_every=2, ema_decay=0.9, ema_decays=(0.5, 0.99), ema_widths=(0.05, 0.1))
OTHER = with_averages(ema_widths=(0.07, 0.15, 0.2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdir and the last state of PLAIN, CONFIG and OTHER, which differ in their averages alone."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name, config in (("plain", PLAIN), ("averages", CONFIG), ("other", OTHER)):
        made[name] = folder / name, jax.device_get(train(experiment(config), folder / name))
    return made


@pytest.fixture(scope="module")
def workdir(runs):
    return epath.Path(runs["averages"][0])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def vector(params):
    return np.concatenate([np.ravel(leaf) for _, leaf in sorted(flatten(params).items())])


# ---- What is tracked


@pytest.mark.slow
def test_further_averages_change_nothing_else(runs):
    for name in ("averages", "other"):
        for part in ("params", "opt_state"):
            assert_same(getattr(runs[name][1], part), getattr(runs["plain"][1], part))
    assert_same(runs["other"][1].ema_params, runs["plain"][1].ema_params)
    assert runs["plain"][1].averages is None


def test_a_further_decay_is_bit_for_bit_the_ema_of_a_run_with_that_decay(runs, workdir):
    assert_same(runs["averages"][1].averages["ema:0.5"], runs["plain"][1].ema_params)
    run = load(workdir, weights="ema:0.50")
    assert (run.weights, run.step) == ("ema:0.5", 40)
    assert_same(run.params, runs["plain"][1].ema_params)


def test_a_further_decay_that_is_of_little_use_is_told(workdir):
    assert load(workdir, weights="ema:0.99").note.startswith(f"{0.99**40:.0%} of the EMA at step 40 ")
    assert load(workdir, weights="ema:0.5").note == ""
    assert load(workdir, weights="width:0.15").note == ""


def test_averages_start_from_the_parameters_of_another_run(runs, workdir):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, init_from=str(workdir)))
    checkpoints = Checkpoints(workdir / "none")
    source = type("Source", (), {"identity": {}, "stamp": ""})()
    state, _ = start_state(experiment(config), source, sharding.make_mesh(), checkpoints)
    checkpoints.close()
    for average in state.averages.values():
        assert_same(average, runs["averages"][1].ema_params)


# ---- What is rebuilt


@pytest.mark.parametrize(("width", "most"), [(0.07, 1e-4), (0.15, 2e-4), (0.2, 3e-3)])
def test_a_rebuilt_width_is_close_to_one_that_was_tracked(width, most, runs, workdir):
    run = load(workdir, weights=f"width:{width}")
    tracked = vector(runs["other"][1].averages[f"width:{width}"])
    assert (run.step, run.weights) == (40, f"width:{width}")
    error = np.linalg.norm(vector(run.params) - tracked) / np.linalg.norm(tracked)
    away = np.linalg.norm(vector(run.params) - vector(runs["averages"][1].ema_params)) / np.linalg.norm(tracked)
    assert error < most, error
    assert away > 5 * error


def test_a_tracked_width_is_that_average(runs, workdir):
    for width in (0.05, 0.1):
        assert_same(load(workdir, weights=f"width:{width}").params, runs["averages"][1].averages[f"width:{width}"])


def test_an_average_may_end_at_an_earlier_snapshot_whose_checkpoint_is_gone(workdir):
    with pytest.raises(UsageError, match="no checkpoint of step 20"):
        load(workdir, step=20)
    run = load(workdir, weights="width:0.12", step=20)
    assert run.step == 20
    shorter = workdir.parent / "shorter"
    shutil.copytree(workdir, shorter)
    for step in range(22, 41, 2):
        (shorter / SNAPSHOTS / f"{step:08d}.safetensors").unlink()
    cut_metrics(shorter / "metrics.jsonl", 20)
    again = load(shorter, weights="width:0.12")
    assert (again.step, again.checkpoint) == (20, run.checkpoint)
    assert_same(again.params, run.params)


def test_rebuilt_averages_are_told_apart(workdir):
    proofs = {load(workdir, weights=f"width:{w}", step=s).checkpoint for w in (0.12, 0.13) for s in (38, 40)}
    assert len(proofs) == 4


# ---- Snapshots


def content(workdir, config=CONFIG):
    return {step: read_snapshot(workdir / SNAPSHOTS, step, config) for step in snapshot_steps(workdir / SNAPSHOTS)}


def assert_same_snapshots(a, b):
    assert a.keys() == b.keys()
    for step in a:
        assert a[step][0] == b[step][0]
        assert_same(a[step][1], b[step][1])


def test_there_is_a_snapshot_of_each_checkpoint_also_of_those_that_are_gone(workdir):
    assert snapshot_steps(workdir / SNAPSHOTS) == list(range(2, 41, 2))
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == [38, 40]
    logged = [line["ema_snapshots"] for line in read_metrics(workdir) if "ema_snapshots" in line]
    assert logged == list(range(1, 21))


@pytest.fixture
def stopped(workdir, tmp_path):
    """A copy of the run as it stood at step 38, with the snapshot of step 40 too, as a kill at its save leaves it."""
    copy = epath.Path(tmp_path / "copy")
    shutil.copytree(workdir, copy)
    (copy / "checkpoints" / "40").rmtree()
    return copy


def test_a_run_that_was_killed_ends_with_the_same_averages_and_snapshots(stopped, runs, workdir):
    alien = stopped / SNAPSHOTS / "00000039.safetensors"
    (stopped / SNAPSHOTS / "00000040.safetensors").copy(alien)  # of a future that is trained otherwise
    (stopped / SNAPSHOTS / "00000042.safetensors.7.tmp").write_text("half")
    (stopped / SNAPSHOTS / "00000038.safetensors").unlink()  # the kill came between checkpoint and snapshot
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 38))
    state = jax.device_get(train(experiment(CONFIG), stopped))
    assert_same(state, runs["averages"][1])
    assert_same_snapshots(content(stopped), content(workdir))
    assert {path.suffix for path in (stopped / SNAPSHOTS).iterdir()} == {".safetensors"}
    assert [line for line in read_metrics(stopped) if "ema_snapshots" in line][-1]["ema_snapshots"] == 20


def test_snapshots_of_a_discarded_future_go(workdir, tmp_path):
    shutil.copytree(workdir / SNAPSHOTS, tmp_path / SNAPSHOTS)
    make_snapshots(epath.Path(tmp_path), CONFIG, last_step=6)
    assert snapshot_steps(epath.Path(tmp_path / SNAPSHOTS)) == [2, 4, 6]
    assert make_snapshots(epath.Path(tmp_path), PLAIN, last_step=0) == ()


def changed(path, position):
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1
    path.write_bytes(damaged)


@pytest.mark.parametrize("position", [9, 100, 2000, -1])
def test_a_flipped_bit_is_noticed_wherever_it_is(position, stopped):
    path = stopped / SNAPSHOTS / "00000012.safetensors"
    changed(path, position)
    with pytest.raises(
        DamagedFileError, match=r"00000012\.safetensors is damaged \(.*\); restore it from a copy, or move"
    ):
        load(stopped, weights="width:0.15")
    load(stopped, weights="width:0.15", step=10)  # which does not need it


def test_a_missing_snapshot_is_named_and_may_be_done_without(stopped):
    (stopped / SNAPSHOTS / "00000012.safetensors").unlink()
    with pytest.raises(
        UsageError, match=r"00000012\.safetensors is missing; restore .* or do without by --unverified$"
    ):
        load(stopped, weights="width:0.15")
    assert load(stopped, weights="width:0.15", unverified=True).step == 40


def test_a_copy_of_another_step_or_run_is_noticed(stopped, runs):
    (stopped / SNAPSHOTS / "00000010.safetensors").copy(stopped / SNAPSHOTS / "00000012.safetensors", overwrite=True)
    with pytest.raises(DamagedFileError, match="it is a copy of step 10"):
        load(stopped, weights="width:0.15")
    other = epath.Path(runs["other"][0]) / SNAPSHOTS
    with pytest.raises(DamagedFileError, match=r"another config, which differs in .*train\.ema_widths"):
        read_snapshot(other, 40, CONFIG)


# ---- On any devices


def test_averages_that_are_split_over_devices_are_saved_whole(tmp_path):
    """A state split over 4 devices continues on 2, and its snapshot is that of whole arrays."""
    rng = np.random.default_rng(0)
    whole = {f"width:{w}": {"dense": {"kernel": rng.normal(size=(256, 256)).astype(np.float32)}} for w in (0.05, 0.1)}

    def state_on(fsdp):
        state = TrainState(np.int32(2), whole["width:0.05"], whole["width:0.1"], (), None, whole)
        return jax.device_put(state, sharding.state_sharding(sharding.make_mesh(fsdp=fsdp), state))

    state, folder = state_on(4), epath.Path(tmp_path)
    assert not state.averages["width:0.05"]["dense"]["kernel"].is_fully_replicated
    Snapshots(folder, CONFIG)(state)
    _, arrays = read_snapshot(folder / SNAPSHOTS, 2, CONFIG)
    assert_same(arrays, flatten({name.removeprefix("width:"): params for name, params in whole.items()}))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, {"data": None, "since_log": {}})
    checkpoints.wait()
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state_on(2))
    restored = checkpoints.restore_state(2, like)
    checkpoints.close()
    assert_same(jax.device_get(restored), jax.device_get(state))
    assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, like)


def test_a_checkpoint_without_further_averages_is_as_it_was(tmp_path):
    """No item, and no handler of one."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(init_state(experiment(PLAIN), jax.random.key(0)), {"data": None, "since_log": {}})
    checkpoints.close()
    assert {path.name for path in (tmp_path / "0").iterdir() if path.is_dir()} == {"state", "ema", "meta"}
    assert "averages" not in (tmp_path / "0" / "_CHECKPOINT_METADATA").read_text()


# ---- Commands


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A workdir of the U-Net with a checkpoint of step 40, and snapshots of drawn averages."""
    workdir = epath.Path(tmp_path_factory.mktemp("unet") / "run")
    options = {**SHORT, "ema_decay": 0.5, "ema_decays": (0.9,), "ema_widths": (0.05, 0.1)}
    config = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)}, diffusion={"T": 10}, train=options)
    described = Experiment.from_config(config)
    names = ("ema:0.9", "width:0.05", "width:0.1")
    state = state_from_params(described, jax.tree.map(jnp.asarray, drawn(config)))
    for step in range(10, 41, 10):
        averages = {name: jax.tree.map(jnp.asarray, drawn(config, seed=step + i)) for i, name in enumerate(names)}
        state = state.replace(step=jnp.int32(step), averages=averages)
        Snapshots(workdir, config)(state)
    shutil.move(workdir / SNAPSHOTS, workdir.parent)
    workdir.rmdir()
    write_run(workdir, described, state)
    shutil.move(workdir.parent / SNAPSHOTS, workdir)
    return workdir


@pytest.mark.slow
def test_every_command_takes_them_like_a_runs(unet, tmp_path, capsys):
    """sample and evaluate from the run, and the same from a file that convert writes."""
    convert("export", unet, tmp_path / "wide.safetensors", "--weights", "width:0.12")
    loaded, file = load_run(unet, weights="width:0.12"), load_run(tmp_path / "wide.safetensors")
    assert_same(file.params, loaded.params)
    assert (file.step, file.weights, file.note) == (40, "width:0.12", "")
    convert("from-parameters", tmp_path / "wide.safetensors", tmp_path / "wide")
    assert_same(load_run(tmp_path / "wide").params, loaded.params)
    short = ["--num-images", "8", "--format", "npz"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        sample.main(arguments.sample(["wide.safetensors", *short, "--out", "file"]))
        sample.main(arguments.sample([str(unet), *short, "--weights", "width:.120"]))
        sample.main(arguments.sample([str(unet), *short, "--weights", "ema:0.9"]))
    made = unet / "generated"
    assert {path.name for path in made.iterdir()} == {
        f"step_40_{w}_ancestral_seed_0" for w in ("width-0.12", "ema-0.9")
    }
    by_run, by_decay = (
        read_images(made / f"step_40_{w}_ancestral_seed_0/images.npz") for w in ("width-0.12", "ema-0.9")
    )
    np.testing.assert_array_equal(read_images(tmp_path / "file" / "images.npz"), by_run)
    assert not np.array_equal(by_run, by_decay)
    capsys.readouterr()


@pytest.mark.slow
def test_an_evaluation_says_which_average_it_is_of(unet, capsys):
    options = ["--metrics", "losses", "--no-figures", "--num-real", "8", "--batch-size", "8"]
    for weights in ("ema", "width:0.12"):
        evaluate.main(arguments.evaluate([str(unet), *options, "--weights", weights]))
    said = sorted(made_of(result).partition(";")[0] for result in read_results(unet)[0])
    assert len(said) == 2
    assert said[1] == "the average width:0.12"
    assert "the average width:0.12" in (unet / "report.html").read_text()
    capsys.readouterr()


REFUSED = {
    "mean": "got weights 'mean', expected ema, raw, ema:DECAY or width:WIDTH, such as ema:0.999",
    "width": "got weights 'width', expected",
    "ema:": "got weights 'ema:', expected",
    "raw:0.5": "got weights 'raw:0.5', expected",
    "width:0.3": "the width of weights width:0.3 is too large; use 0.288 or less",
    "width:nan": "the width of weights width:nan is too large",
    "ema:0.98": "the run has no ema:0.98, but ema, ema:0.5, ema:0.99 (ema is of decay 0.9); choose among these, or train",
    "width:0.004": "the width 0.004 cannot be rebuilt from 20 snapshots of the widths 0.05, 0.1, since its profile would be off",
}


@pytest.mark.parametrize("weights", REFUSED)
def test_weights_that_are_not_there_are_refused(weights, workdir):
    with pytest.raises(UsageError) as refusal:
        load(workdir, weights=weights)
    assert str(refusal.value).startswith(REFUSED[weights])


def test_what_a_run_without_widths_cannot_give_is_refused(runs, workdir):
    with pytest.raises(UsageError, match=r"of which the run has none; train with --train\.ema-widths 0\.05 0\.1$"):
        load(runs["plain"][0], weights="width:0.15")
    with pytest.raises(UsageError, match=r"has no snapshot of step 3; those there are 2, 4, "):
        load(workdir, weights="width:0.15", step=3)


def test_weights_have_one_spelling():
    assert canonical("ema:.9990") == "ema:0.999"
    assert canonical("width:15e-2") == "width:0.15"
