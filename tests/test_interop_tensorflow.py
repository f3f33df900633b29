"""The authors' checkpoints: raw and EMA parameters and Adam's moments, every variable used once or named."""

import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from interop import convert
from tiny import TINY, experiment

from ddpm_jax.core.errors import UsageError
from ddpm_jax.interop import tensorflow
from ddpm_jax.interop.names import parameters
from ddpm_jax.interop.tensorflow import read_checkpoint
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.parameters import flatten
from ddpm_jax.training.step import init_state
from ddpm_jax.training.workdir import load_run

EMA = "/ExponentialMovingAverage"
STEPS = 3


class Reader:
    """What TensorFlow's reader offers, of arrays in memory; it counts how often each is read."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.reads = dict.fromkeys(arrays, 0)

    def get_variable_to_shape_map(self):
        return {name: list(array.shape) for name, array in self.arrays.items()}

    def get_tensor(self, name):
        self.reads[name] += 1
        return self.arrays[name]


def checkpoint(*kinds):
    """Arrays as in a checkpoint of TINY: the parameters, and the kinds of variables beside them."""
    draws = np.random.default_rng(0)
    names = {p.tensorflow + kind: p.shape for kind in ("", *kinds) for p in parameters(experiment(TINY))}
    arrays = {name: draws.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    return arrays | {"global_step": np.int64(30), "beta1_power": np.float32(0.9), "beta2_power": np.float32(0.999)}


@pytest.fixture
def read(monkeypatch):
    """Reads arrays as if they were a checkpoint: (state, unused names, the reader)."""

    def read(arrays):
        reader = Reader(arrays)
        monkeypatch.setattr(tensorflow, "_reader", lambda prefix: reader)
        return *read_checkpoint("PREFIX", experiment(TINY)), reader

    return read


def assert_is(tree, arrays, kind):
    ours = flatten(tree)
    assert ours.keys() == {p.path for p in parameters(experiment(TINY))}
    for p in parameters(experiment(TINY)):
        np.testing.assert_array_equal(ours[p.path], arrays[p.tensorflow + kind], err_msg=p.path)


def test_every_variable_is_used_exactly_once(read):
    arrays = checkpoint(EMA, "/Adam", "/Adam_1")
    state, unused, reader = read(arrays)
    assert unused == ["beta1_power", "beta2_power"]
    assert {reader.reads[name] for name in unused} == {0}
    assert {count for name, count in reader.reads.items() if name not in unused} == {1}
    assert_is(state.params, arrays, "")
    assert_is(state.ema_params, arrays, EMA)
    adam = state.opt_state[1]
    assert_is(adam.mu, arrays, "/Adam")
    assert_is(adam.nu, arrays, "/Adam_1")
    assert int(state.step) == 30
    assert [int(count) for _, count in optax.tree.get_all_with_path(state.opt_state, "count")] == [30, 30]


def test_without_adams_moments_the_optimizer_starts_anew(read):
    state, _, _ = read(checkpoint(EMA))
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, experiment(TINY).optimizer.init(state.params))
    assert int(state.step) == 30


def test_without_global_step_the_step_is_0(read):
    arrays = checkpoint(EMA)
    del arrays["global_step"]
    assert int(read(arrays)[0].step) == 0


def test_missing_extra_and_misshapen_variables_are_named(read):
    arrays = checkpoint(EMA, "/Adam", "/Adam_1")
    end = "; use the config that it was trained with, or a whole copy of the file"
    one = np.zeros((), np.float32)
    for changed, message in [
        ({"model/conv_in/W" + EMA: None}, "model/conv_in/W/ExponentialMovingAverage is missing"),
        ({"model/conv_in/W/Adam_1": None}, "model/conv_in/W/Adam_1 is missing"),
        ({"model/conv_in/V": one}, "model/conv_in/V is not of this network"),
        ({"model/conv_in/b": one}, "model/conv_in/b has shape (), expected (8,)"),
    ]:
        with pytest.raises(UsageError) as refusal:
            read({name: array for name, array in (arrays | changed).items() if array is not None})
        assert str(refusal.value) == f"PREFIX does not fit the network of its config: {message}{end}"


def test_without_tensorflow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UsageError) as refusal:
        read_checkpoint("PREFIX", experiment(TINY))
    assert "PREFIX needs tensorflow" in str(refusal.value)
    assert 'pip install "ddpm-jax[tensorflow]"' in str(refusal.value)


@pytest.fixture(scope="module")
def tf():
    return pytest.importorskip(
        "tensorflow", reason="what the authors' checkpoints are read with: the extra `tensorflow`"
    )


@pytest.fixture(scope="module")
def written(tf, tmp_path_factory):
    """(prefix, arrays): TensorFlow's own Adam and EMA run for some steps on TINY's variables, and save as the authors do."""
    prefix = str(tmp_path_factory.mktemp("checkpoint") / "model.ckpt")
    v1, draws = tf.compat.v1, np.random.default_rng(0)
    with tf.Graph().as_default():
        variables = [
            v1.Variable(draws.normal(size=p.shape).astype(np.float32), name=p.tensorflow)
            for p in parameters(experiment(TINY))
        ]
        loss = tf.add_n([tf.reduce_sum(variable**2) for variable in variables])
        train = v1.train.AdamOptimizer(0.01).minimize(loss, global_step=v1.train.get_or_create_global_step())
        with tf.control_dependencies([train]):
            step = tf.train.ExponentialMovingAverage(0.5).apply(variables)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            for _ in range(STEPS):
                session.run(step)
            arrays = session.run({variable.op.name: variable for variable in v1.global_variables()})
            written = v1.train.Saver().save(session, prefix, global_step=STEPS)
    assert written == f"{prefix}-{STEPS}"
    return written, arrays


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_tensorflow_becomes_a_run_with_raw_and_ema_parameters(written, tmp_path, capsys):
    prefix, arrays = written
    (tmp_path / "tiny.py").write_text(f"from ddpm_jax.config import *\nconfig = {TINY!r}\n")
    convert("from-tensorflow", prefix, tmp_path / "run", "--config", tmp_path / "tiny.py")
    assert "Not used: beta1_power, beta2_power." in capsys.readouterr().out
    raw, ema = (load_run(tmp_path / "run", weights=weights) for weights in ("raw", "ema"))
    assert raw.config == TINY
    assert raw.step == ema.step == STEPS
    assert_is(raw.params, arrays, "")
    assert_is(ema.params, arrays, EMA)
    differ = [np.any(a != b) for a, b in zip(jax.tree.leaves(raw.params), jax.tree.leaves(ema.params), strict=True)]
    assert all(differ)
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    state = checkpoints.restore_state(STEPS, jax.eval_shape(lambda: init_state(experiment(TINY), jax.random.key(0))))
    checkpoints.close()
    assert_is(state.opt_state[1].mu, arrays, "/Adam")
    assert_is(state.opt_state[1].nu, arrays, "/Adam_1")


@pytest.mark.filterwarnings("ignore")
def test_checkpoint_that_is_missing_or_cut_short_is_refused(tf, written, tmp_path):
    prefix, _ = written
    copy = str(tmp_path / "model.ckpt-1")
    index, data = (Path(prefix + ending).read_bytes() for ending in (".index", ".data-00000-of-00001"))
    message = (
        rf"^{copy} cannot be read as a TensorFlow checkpoint \(.*\); give the path of its files without .index or .data"
    )
    for files in [(), (index[: len(index) // 2], data), (index, data[: len(data) // 2]), (index,)]:
        for ending, content in zip((".index", ".data-00000-of-00001"), files, strict=False):
            Path(copy + ending).write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_checkpoint(copy, experiment(TINY))
        for path in tmp_path.iterdir():
            path.unlink()
