"""Checkpoints: every bit comes back, every flipped byte is noticed, and no failure costs an intact one."""

import copy
import dataclasses
import errno
import gc
import hashlib
import json
import re
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint._src.futures import future
from tiny import experiment, tiny

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.diffusion.losses import init_loss_history
from ddpm_jax.training import checkpoint
from ddpm_jax.training.checkpoint import MANIFEST, Checkpoints, find_damage, keep_for_good
from ddpm_jax.training.step import TrainState, init_state

META = {"data": {"images": 1797, "sha256": "00ff"}, "since_log": {"loss": [0.1 + 0.2, 1e-45, -0.0]}}


def small_state(step, *, seed=0, history=False):
    """A training state of two parameters: quick to save."""
    rng = np.random.default_rng([seed, step])
    params, ema_params = (
        {"conv": {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), "bias": jnp.full(8, i, jnp.float32)}}
        for i in range(2)
    )
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        ema_params=ema_params,
        opt_state=optax.adam(1e-3).init(params),
        loss_history=init_loss_history(5) if history else None,
    )


def shapes_of(state):
    """What a state is restored as: the shape, type and sharding of each array."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


# After an error, Orbax's abandoned futures call a loop that is closed, which pytest hears of when they are collected.
orbax_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def quiet(caplog):
    """Keeps what Orbax logs of an error, besides raising it, within the test."""
    for name in ("absl", "asyncio"):
        caplog.set_level("CRITICAL", logger=name)
    yield
    time.sleep(0.1)
    gc.collect()


def sentence(raised):
    """The message of a refusal, which is one line that the script can print."""
    message = str(raised.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


class Opened(Checkpoints):
    """Checkpoints that remember what they said, closed at the end of a `with`."""

    def __init__(self, directory, **options):
        self.said = []
        super().__init__(directory, say=self.said.append, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def save_all(self, *steps, **options):
        for step in steps:
            self.save(small_state(step, **options), META)
        self.wait()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the checkpoints of steps 10 and 20; copy it."""
    directory = tmp_path_factory.mktemp("two_steps")
    with Opened(directory) as checkpoints:
        checkpoints.save_all(10, 20)
    return directory


@pytest.fixture
def directory(two_steps, tmp_path):
    """A copy of `two_steps`, to damage."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


# ---- Save and restore


def test_a_networks_whole_state_comes_back_bit_for_bit(tmp_path):
    config = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)}, diffusion={"t_sampler": "loss_history"})
    rng = np.random.default_rng(0)
    special = np.array([-0.0, np.inf, -np.inf, np.nan, 1e-45, np.finfo(np.float32).max], np.float32)

    def fill(leaf):
        if leaf.dtype == np.int32:
            return np.full(leaf.shape, 12345, np.int32)
        values = rng.standard_normal(leaf.size).astype(np.float32)
        values[: len(special)] = special[: leaf.size]
        return values.reshape(leaf.shape)

    state = jax.device_put(
        jax.tree.map(fill, jax.eval_shape(lambda: init_state(experiment(config), jax.random.key(0))))
    )
    assert len(jax.tree.leaves(state.opt_state)) > 2 * len(jax.tree.leaves(state.params))
    with Opened(tmp_path) as checkpoints:
        checkpoints.save(state, META)
        checkpoints.wait()
        assert checkpoints.choose() == 12345
        assert_same_bits(checkpoints.restore_state(12345, shapes_of(state)), state)
    assert checkpoints.said == []


@pytest.mark.parametrize("history", [False, True])
def test_every_item_comes_back_from_any_step(history, tmp_path):
    with Opened(tmp_path) as checkpoints:
        checkpoints.save_all(1, 2, history=history)
        for step in (1, 2):
            state = small_state(step, history=history)
            assert_same_bits(checkpoints.restore_state(step, shapes_of(state)), state)
            assert_same_bits(checkpoints.restore_item(step, "ema", shapes_of(state.ema_params)), state.ema_params)
            assert checkpoints.restore_meta(step) == META


def test_training_on_does_not_disturb_a_save(tmp_path):
    state = dataclasses.replace(small_state(1), params={"kernel": jnp.zeros(2**18)})
    expected = jax.tree.map(lambda a: np.array(a, copy=True), state)
    go_on = jax.jit(
        lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0
    )  # as the training step donates its state
    with Opened(tmp_path) as checkpoints:
        checkpoints.save(state, META)
        for _ in range(20):
            state = go_on(state)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore_state(1, shapes_of(state)), expected)


def test_logging_on_does_not_disturb_a_save(tmp_path):
    """The losses that wait for a log line go on being collected while the save is written."""
    with Opened(tmp_path / "checkpoints") as checkpoints:
        for step in range(10, 60, 10):  # several, since the writing is a race
            meta = copy.deepcopy(META)
            checkpoints.save(small_state(step), meta)
            meta["since_log"]["loss"].append(float(step))
            checkpoints.wait()
            assert checkpoints.restore_meta(step) == META


def mesh_of(devices, fsdp):
    return sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def saved_on_eight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved_on_eight")
    big = {"kernel": np.arange(2**16, dtype=np.float32).reshape(256, 256), "bias": np.ones(4, np.float32)}
    state = dataclasses.replace(small_state(7), params=big, ema_params=jax.tree.map(np.negative, big))
    state = jax.device_put(state, sharding.state_sharding(mesh_of(8, 4), state))
    assert not state.params["kernel"].sharding.is_fully_replicated
    with Opened(directory) as checkpoints:
        checkpoints.save(state, META)
    return directory, state


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 2), (4, 1), (8, 8)])
def test_arrays_do_not_depend_on_the_devices_they_return_to(devices, fsdp, saved_on_eight):
    directory, state = saved_on_eight
    like = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        state,
        sharding.state_sharding(mesh_of(devices, fsdp), state),
    )
    with Opened(directory) as checkpoints:
        restored = checkpoints.restore_state(7, like)
    assert_same_bits(restored, state)
    for array in jax.tree.leaves(restored):
        assert len(array.sharding.device_set) == devices
    assert restored.params["kernel"].sharding.is_fully_replicated == (fsdp == 1)


# ---- Damage


def test_a_flipped_bit_anywhere_is_noticed(directory):
    newest = directory / "20"
    names = [str(path.relative_to(newest)) for path in files_of(newest)]
    assert MANIFEST in names
    assert len(names) > 20
    for i, name in enumerate(names):
        path = newest / name
        size = path.stat().st_size
        for position in {0, size // 2, size - 1}:
            flip(path, position, bit=i % 8)
            with Opened(directory) as checkpoints:
                assert checkpoints.choose() == 10, (name, position)
            damage = "its manifest is damaged" if name == MANIFEST else f"the file {name} is not what was written"
            assert checkpoints.said == [f"The checkpoint of step 20 is passed over: {damage}."]
            flip(path, position, bit=i % 8)
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 20


def test_any_byte_of_the_manifest_counts(directory):
    folder, manifest = checkpoint.epath.Path(directory / "20"), directory / "20" / MANIFEST
    content = manifest.read_bytes()
    for position in range(0, len(content), 13):  # also in its own digest, which ends it
        flip(manifest, position, bit=position % 8)
        assert find_damage(folder) == "its manifest is damaged", position
        manifest.write_bytes(content)
    assert find_damage(folder) is None


def test_a_missing_or_truncated_file_is_noticed(directory):
    newest = directory / "20"
    for path in files_of(newest):
        content = path.read_bytes()
        for left in (None, b"", content[:-1]):
            if left is None:
                path.unlink()
            else:
                path.write_bytes(left)
            with Opened(directory) as checkpoints:
                assert checkpoints.choose() == 10, (path, left)
            assert len(checkpoints.said) == 1
            assert checkpoints.said[0].startswith("The checkpoint of step 20 is passed over: ")
            path.write_bytes(content)
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 20


def test_a_missing_file_is_named(directory):
    (directory / "20/ema/_METADATA").unlink()
    assert find_damage(checkpoint.epath.Path(directory / "20")) == "the file ema/_METADATA is missing"


def test_a_manifest_that_agrees_with_itself_alone_is_not_enough(directory):
    # The manifest of another step is whole, but not of these files.
    shutil.copy(directory / "10" / MANIFEST, directory / "20" / MANIFEST)
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 10


def replace_step(directory, step, other):
    shutil.rmtree(directory / str(step))
    shutil.copytree(directory / str(other), directory / str(step))


def as_before_steps_were_recorded(folder):
    """Makes a manifest what earlier versions wrote: the files, and a digest of these alone."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"files": files, "sha256": digest}, sort_keys=True))


def test_a_copy_of_another_step_is_passed_over(directory):
    replace_step(directory, 20, other=10)
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 10
        assert checkpoints.said == ["The checkpoint of step 20 is passed over: it is a copy of step 10."]
        with pytest.raises(UsageError, match="it is a copy of step 10; choose another step"):
            checkpoints.choose(step=20)


def test_a_copy_of_another_step_whose_manifest_has_no_step_is_not_trained_on(directory):
    replace_step(directory, 20, other=10)
    as_before_steps_were_recorded(directory / "20")
    with Opened(directory) as checkpoints:
        with pytest.raises(UsageError, match="holds the state of step 10; choose another step") as raised:
            checkpoints.restore_state(checkpoints.choose(), shapes_of(small_state(0)))
        sentence(raised)


def test_checkpoints_of_earlier_versions_are_taken_and_checked(directory):
    for step in (10, 20):
        as_before_steps_were_recorded(directory / str(step))
    with Opened(directory, config=tiny()) as checkpoints:
        assert checkpoints.choose() == 20
        assert_same_bits(checkpoints.restore_state(20, shapes_of(small_state(20))), small_state(20))
        flip(directory / "20/_CHECKPOINT_METADATA", 0)
        assert checkpoints.choose() == 10
        flip(directory / "10" / MANIFEST, 30)
        with pytest.raises(UsageError, match="is intact"):
            checkpoints.choose()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"files": {}}', bytes(100), b"\xff\xfe", b"[" * 100_000, b'{"sha256": NaN}', b"null"],
    ids=lambda content: repr(content[:15]),
)
def test_whatever_stands_in_a_manifest_is_noticed(content, directory):
    (directory / "20" / MANIFEST).write_bytes(content)
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 10
    assert checkpoints.said == ["The checkpoint of step 20 is passed over: its manifest is damaged."]


def test_another_config_than_the_checkpoints_is_refused_with_its_fields(tmp_path):
    with Opened(tmp_path, config=tiny()) as checkpoints:
        checkpoints.save_all(10)
        assert checkpoints.choose() == 10
    may_change = tiny(train={"steps": 80, "fsdp": 2})
    with Opened(tmp_path, config=may_change) as checkpoints:
        assert checkpoints.choose() == 10
    other = tiny(diffusion={"beta_end": 0.3}, model={"ch_mult": (1,)})
    with Opened(tmp_path, config=other) as checkpoints:
        for step in (None, 10):
            with pytest.raises(UsageError) as raised:
                checkpoints.choose(step=step)
            message = sentence(raised)
            assert "model.ch_mult (checkpoint [1, 2], config.json [1])" in message
            assert "diffusion.beta_end (checkpoint 0.5, config.json 0.3)" in message
            assert message.count("checkpoint ") == 3  # no other field
            assert "correct config.json" in message
        assert checkpoints.choose(unverified=True) == 10
    assert checkpoints.said == []


def test_meta_that_is_none_is_told_in_a_sentence(directory):
    (metadata,) = (path for path in files_of(directory / "20/meta") if b"since_log" in path.read_bytes())
    for content in ("[]", "{}", '{"data": 1, "since_log": 2}', '{"data"'):
        metadata.write_text(content)
        with Opened(directory) as checkpoints:
            with pytest.raises(
                UsageError, match=r"step 20 .* cannot be restored \(.+\); choose another step"
            ) as raised:
                checkpoints.restore_meta(checkpoints.choose(unverified=True))
            sentence(raised)


def test_a_step_without_a_manifest_was_cut_short(directory):
    (directory / "20" / MANIFEST).unlink()
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 10
    assert checkpoints.said == [
        "The checkpoint of step 20 is passed over: it has no manifest, so its saving was cut short."
    ]


def test_all_damaged_is_refused_rather_than_begun_anew(directory):
    for step in (10, 20):
        flip(next((directory / str(step) / "state/d").iterdir()), 0)
    with Opened(directory) as checkpoints:
        with pytest.raises(UsageError) as raised:
            checkpoints.choose()
        assert sentence(raised) == (
            f"no checkpoint in {directory} is intact; start in another workdir, restore a copy of this one, "
            "or use the newest with --unverified"
        )
        assert len(checkpoints.said) == 2
        assert checkpoints.choose(unverified=True) == 20


@pytest.mark.parametrize(("cut_short", "damaged"), [("20", "10"), ("10", "20")])
def test_one_damaged_and_one_cut_short_is_refused_too(cut_short, damaged, directory):
    (directory / cut_short / MANIFEST).unlink()
    flip(directory / damaged / "_CHECKPOINT_METADATA", 0)
    with Opened(directory) as checkpoints, pytest.raises(UsageError, match="is intact"):
        checkpoints.choose()


def test_nothing_ever_saved_whole_is_a_beginning(directory, tmp_path):
    shutil.rmtree(directory / "10")
    (directory / "20" / MANIFEST).unlink()
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() is None
        assert checkpoints.choose(unverified=True) == 20
    assert len(checkpoints.said) == 1
    with Opened(tmp_path / "new") as checkpoints:
        assert checkpoints.choose() is None
        assert checkpoints.choose(unverified=True) is None
        assert checkpoints.steps() == []
    assert checkpoints.said == []


def test_several_steps_without_manifests_are_refused_rather_than_begun_anew(directory):
    """A kill leaves one at most; two have lost theirs in another way, as in being copied."""
    for step in (10, 20):
        (directory / str(step) / MANIFEST).unlink()
    with Opened(directory) as checkpoints, pytest.raises(UsageError, match=r"no checkpoint in .* is intact"):
        checkpoints.choose()


def test_a_given_step_is_taken_or_refused(directory):
    flip(directory / "20/_CHECKPOINT_METADATA", 0)
    with Opened(directory) as checkpoints:
        assert checkpoints.choose(step=10) == 10
        with pytest.raises(UsageError) as raised:
            checkpoints.choose(step=20)
        assert sentence(raised) == (
            f"the checkpoint of step 20 in {directory} is not intact: the file _CHECKPOINT_METADATA is not what was "
            "written; choose another step, or skip the check with --unverified"
        )
        assert checkpoints.choose(step=20, unverified=True) == 20
        with pytest.raises(UsageError) as raised:
            checkpoints.choose(step=15)
        assert sentence(raised) == f"{directory} has no checkpoint of step 15; those there are 10, 20"
        with pytest.raises(UsageError, match="has no checkpoint of step 15"):
            checkpoints.choose(step=15, unverified=True)
    assert checkpoints.said == []


def test_a_given_step_of_an_empty_folder_is_refused(tmp_path):
    with Opened(tmp_path) as checkpoints, pytest.raises(UsageError) as raised:
        checkpoints.choose(step=5)
    assert sentence(raised) == f"{tmp_path} has no checkpoint of step 5; there are none"


@orbax_fails
def test_what_cannot_be_restored_is_told_in_a_sentence(directory, quiet):
    shutil.rmtree(directory / "20/state")
    with Opened(directory) as checkpoints:
        with pytest.raises(UsageError) as raised:
            checkpoints.restore_state(checkpoints.choose(unverified=True), shapes_of(small_state(0)))
        assert re.fullmatch(
            rf"the checkpoint of step 20 in {directory} cannot be restored \(.+\); choose another step",
            sentence(raised),
        )


@orbax_fails
def test_a_state_of_another_shape_is_told_in_a_sentence(directory, quiet):
    other = dataclasses.replace(
        small_state(0), ema_params={"conv": {"kernel": jnp.zeros((16, 9)), "bias": jnp.zeros(8)}}
    )
    with Opened(directory) as checkpoints:
        with pytest.raises(UsageError, match=r"cannot be restored \(.+\); choose another step$") as raised:
            checkpoints.restore_state(20, shapes_of(other))
        sentence(raised)


def test_an_extra_file_is_tolerated(directory):
    for name in ("note.txt", "state/note.txt", "ema/d/note"):
        (directory / "20" / name).write_text("not ours")
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 20
        assert_same_bits(checkpoints.restore_state(20, shapes_of(small_state(20))), small_state(20))
        checkpoints.save_all(30, 40)
        assert checkpoints.steps() == [30, 40]  # and is deleted with the step
    assert not (directory / "20").exists()


def test_sampling_needs_the_ema_item_alone(directory):
    shutil.rmtree(directory / "20/state")
    shutil.rmtree(directory / "20/meta")
    ema = small_state(20).ema_params
    with Opened(directory) as checkpoints:
        assert checkpoints.choose(items=("ema",)) == 20
        assert_same_bits(checkpoints.restore_item(20, "ema", shapes_of(ema)), ema)
        assert checkpoints.choose(items=("state", "ema")) == 10
        flip(directory / "20/_CHECKPOINT_METADATA", 0)  # a file of no item counts for each
        assert checkpoints.choose(items=("ema",)) == 10


# ---- Retention


def test_the_newest_and_every_nth_stay(tmp_path):
    with Opened(tmp_path, keep_last=2, keep_every=30) as checkpoints:
        checkpoints.save_all(*range(10, 80, 10))
        assert checkpoints.steps() == [30, 60, 70]
        assert [step for step in checkpoints.steps() if find_damage(checkpoints.folder(step))] == []
    with Opened(tmp_path, keep_last=3) as checkpoints:
        checkpoints.save_all(80, 90)
        assert checkpoints.steps() == [70, 80, 90]


def test_what_is_kept_for_good_stays_intact(tmp_path):
    with Opened(tmp_path, keep_last=3) as checkpoints:
        checkpoints.save_all(10, 20, 30)
        keep_for_good(checkpoints.directory, [10])
    with Opened(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save_all(40, 50)
        assert checkpoints.steps() == [10, 40, 50]
        assert find_damage(checkpoints.folder(10)) is None


def test_an_unfinished_step_costs_no_intact_one(directory):
    for step in (15, 97, 98, 99):
        shutil.copytree(directory / "10", directory / str(step))
        (directory / str(step) / MANIFEST).unlink()
    with Opened(directory, keep_last=3) as checkpoints:
        assert checkpoints.choose() == 20
        checkpoints.save_all(30)
        assert checkpoints.steps() == [10, 15, 20, 30, 97, 98, 99]
        checkpoints.save_all(40)
        assert checkpoints.steps() == [15, 20, 30, 40, 97, 98, 99]
        assert checkpoints.choose() == 40


def test_damaged_steps_cost_no_intact_one(directory):
    for step in (24, 90):
        shutil.copytree(directory / "10", directory / str(step))
        flip(directory / str(step) / "_CHECKPOINT_METADATA", 0)
    with Opened(directory, keep_last=2) as checkpoints:
        assert checkpoints.choose() == 20
        checkpoints.save_all(25)  # a signal, or another interval than before
        assert find_damage(checkpoints.folder(20)) is find_damage(checkpoints.folder(25)) is None
        assert checkpoints.steps() == [20, 24, 25, 90]
    with Opened(directory, keep_last=2) as checkpoints:
        assert checkpoints.choose() == 25
        checkpoints.save_all(30, 90)
        assert checkpoints.steps() == [30, 90]
        assert checkpoints.choose() == 90


def test_a_damaged_step_is_saved_over(directory):
    flip(directory / "20/_CHECKPOINT_METADATA", 0)
    (directory / "20/state/stale").write_text("of the damaged one")
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 10
        checkpoints.save_all(20, seed=1)
        assert checkpoints.choose() == 20
        assert_same_bits(checkpoints.restore_state(20, shapes_of(small_state(20))), small_state(20, seed=1))
    assert not (directory / "20/state/stale").exists()


def test_what_a_killed_save_left_is_no_step_and_goes_with_the_next(directory):
    left = directory / "15.orbax-checkpoint-tmp"
    shutil.copytree(directory / "10", left)
    (directory / "checkpoint").mkdir()
    (directory / "30").write_text("a file is no step")
    with Opened(directory) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert left.exists()  # only looking deletes nothing: a run may be saving there
        checkpoints.save_all(25)
        assert checkpoints.steps() == [20, 25]
    assert not left.exists()


class Killed(BaseException):
    """What ends a process in the middle of its work."""


def killed(*_, **__):
    raise Killed


def kill(checkpoints):
    """Ends as a kill does: without tidying up."""
    checkpoints._pending = None
    checkpoints.close()


def test_a_kill_while_an_old_step_is_deleted_leaves_no_step(directory, monkeypatch):
    checkpoints = Opened(directory)
    rmtree, half = type(checkpoints.directory).rmtree, []

    def killed_half_way(path, **options):
        if checkpoint.DELETING in path.name and path.exists():
            half.append(path)
            (path / MANIFEST).unlink()
            raise Killed
        rmtree(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(checkpoints.directory), "rmtree", killed_half_way)
        checkpoints.save(small_state(30), META)
        with pytest.raises(Killed):
            checkpoints._pending.result()
    kill(checkpoints)
    assert len(half) == 1
    assert half[0].exists()
    with Opened(directory) as checkpoints:
        assert checkpoints.steps() == [20, 30]
        assert checkpoints.choose() == 30
        checkpoints.sweep()
        assert checkpoints.choose() == 30
    assert checkpoints.said == []
    assert sorted(path.name for path in directory.iterdir()) == ["20", "30"]


def test_first_saves_killed_before_their_manifests_are_a_beginning(tmp_path, monkeypatch):
    """However many there were: what has no manifest yet has no step's name."""
    for step in (7, 10):
        checkpoints = Opened(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "write_manifest", killed)
            checkpoints.save(small_state(step), META)
            with pytest.raises(Killed):
                checkpoints._pending.result()
        kill(checkpoints)
        assert [path.name for path in tmp_path.iterdir()] == [f"{step}.saving.tmp"]
        with Opened(tmp_path) as checkpoints:
            assert checkpoints.steps() == []
            assert checkpoints.choose() is None
        assert checkpoints.said == []
    with Opened(tmp_path) as checkpoints:
        checkpoints.save_all(10)
        assert checkpoints.choose() == 10
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


# ---- Failures while saving


@pytest.mark.parametrize(
    ("error", "told", "remedy"),
    [
        (OSError(errno.ENOSPC, "full"), "No space left on device", "make room"),
        (OSError(errno.EDQUOT, "quota"), "Disk quota exceeded", "make room"),
        (OSError(errno.EROFS, "ro"), "Read-only file system", "make the folder writable"),
        (OSError(errno.EIO, "io"), "Input/output error", "fix that"),
        (
            OSError(errno.ENOENT, "gone"),
            "No such file or directory",
            "another process has written or deleted files there",
        ),
        (ValueError("DATA_LOSS\na list of files [os_error_code='28']"), "No space left on device", "make room"),
        (ValueError("DATA_LOSS [OS error 30: EROFS]"), "Read-only file system", "make the folder writable"),
        (TimeoutError("waited in vain\nfor long"), "waited in vain", "fix that"),
    ],
)
def test_a_failed_save_tells_the_systems_reason_and_what_helps(error, told, remedy, directory, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with Opened(directory) as checkpoints:
        checkpoints.save(small_state(30), META)
        with pytest.raises(RunError) as raised:
            checkpoints.wait()
        assert f"failed ({told}); earlier checkpoints are intact: {remedy}" in sentence(raised)
        assert ("make room" in str(raised.value)) == (remedy == "make room")
        assert checkpoints.choose() == 20


def test_a_clock_that_jumps_breaks_no_save(tmp_path, monkeypatch):
    """Orbax takes the time of the clock on the wall for the time that a save has taken."""
    left, asked = future.get_remaining_time, []

    def after_the_jump(start, seconds):
        asked.append(seconds)
        return left(start - 120 * 86400, seconds)

    monkeypatch.setattr(future, "get_remaining_time", after_the_jump)
    with Opened(tmp_path) as checkpoints:
        checkpoints.save_all(10)
        assert checkpoints.choose() == 10
    assert asked


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_is_told_at_the_next_and_costs_nothing(directory, monkeypatch):
    with Opened(directory) as checkpoints:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "write_manifest", full_disk)
            checkpoints.save(small_state(30), META)
            with pytest.raises(RunError) as raised:
                checkpoints.save(small_state(40), META)
        assert sentence(raised) == (
            f"saving to {directory} failed (No space left on device); earlier checkpoints are intact: "
            "make room and run the same command again"
        )
        assert checkpoints.choose() == 20
        checkpoints.save_all(30)
        assert checkpoints.choose() == 30


def test_closing_tells_of_a_failed_save(directory, monkeypatch):
    checkpoints = Opened(directory)
    monkeypatch.setattr(checkpoint, "write_manifest", full_disk)
    checkpoints.save(small_state(30), META)
    with pytest.raises(RunError, match=r"^saving to .* failed \(No space left on device\); "):
        checkpoints.close()


@orbax_fails
def test_a_folder_that_cannot_be_made_is_told(tmp_path, quiet):
    (tmp_path / "file").write_text("")
    with Opened(tmp_path / "file/checkpoints") as checkpoints, pytest.raises(RunError) as raised:
        checkpoints.save(small_state(1), META)
    assert re.match(
        rf"saving to {tmp_path}/file/checkpoints/1 failed \(.*\); earlier checkpoints are", sentence(raised)
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if not done or done.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@orbax_fails
@pytest.mark.parametrize("kilobytes", [0, 16, 48])
def test_a_full_disk_leaves_the_checkpoint_before_intact(kilobytes, small_disk, quiet):
    directory, filler = small_disk / "checkpoints", small_disk / "filler"
    with Opened(directory) as checkpoints:
        checkpoints.save_all(1)
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - kilobytes * 1024))
    checkpoints = Opened(directory)
    with pytest.raises(RunError) as raised:
        checkpoints.save_all(2)
    checkpoints.close()
    assert re.fullmatch(
        rf"saving to {directory}(/2)? failed \(No space left on device\); earlier checkpoints are intact: "
        "make room and run the same command again",
        sentence(raised),
    )
    with Opened(directory) as checkpoints:
        assert checkpoints.choose() == 1
        assert_same_bits(checkpoints.restore_state(1, shapes_of(small_state(1))), small_state(1))
        filler.unlink()
        checkpoints.save_all(2)
        assert checkpoints.choose() == 2
        assert checkpoints.steps() == [1, 2]


def test_small_arrays_are_saved_without_being_cut(tmp_path, monkeypatch):
    """Of devices that hold the same array one hands it over whole: eight parts of each would be thousands of operations."""
    cut = []
    real = jax.lax.slice_in_dim
    monkeypatch.setattr(jax.lax, "slice_in_dim", lambda *args, **kwargs: cut.append(args) or real(*args, **kwargs))
    everywhere = sharding.replicated(sharding.make_mesh())
    with Opened(tmp_path) as checkpoints:
        checkpoints.save(jax.device_put(small_state(10), everywhere), META)
    assert not cut
