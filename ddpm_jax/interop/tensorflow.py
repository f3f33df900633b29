"""Importing the authors' TensorFlow checkpoints: parameters, EMA, Adam's moments and the step.

    model/down_1/attn_0/q/W                              a parameter
    model/down_1/attn_0/q/W/ExponentialMovingAverage     its moving average
    model/down_1/attn_0/q/W/Adam, .../Adam_1             Adam's first and second moment, optional
    global_step                                          the step, 0 if missing

TensorFlow (the extra `tensorflow`) is needed only to read the files.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import optax

from ddpm_jax.core.errors import UsageError, first_line, import_extra
from ddpm_jax.interop.names import parameters
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.parameters import check_fit, unflatten
from ddpm_jax.training.step import TrainState, state_from_params

PARAMS, EMA, MOMENT_1, MOMENT_2 = "", "/ExponentialMovingAverage", "/Adam", "/Adam_1"


def read_checkpoint(prefix: str, experiment: Experiment) -> tuple[TrainState, list[str]]:
    """Reads a checkpoint: the training state, and the names of unused variables.

    Every variable under `model/` is used exactly once; of the others only global_step is. Without Adam's moments the optimizer
    starts afresh, with its warm-up.

    Args:
        prefix: The path of the files without `.index` or `.data`.
        experiment: The experiment of the checkpoint's network.

    Raises:
        UsageError: If the checkpoint cannot be read, or its variables do not fit the network.
    """
    experiment.check_unconditional("a checkpoint of the authors' code")
    if experiment.num_classes:
        raise UsageError(
            f"the authors' networks have no classes, but the config has model.num_classes={experiment.num_classes}; set it to 0"
        )
    with _told(prefix):
        reader = _reader(prefix)
    found = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    table = parameters(experiment)
    kinds = [PARAMS, EMA]
    if any(name.endswith((MOMENT_1, MOMENT_2)) for name in found):
        kinds += [MOMENT_1, MOMENT_2]
    expected = {p.tensorflow + kind: p.shape for kind in kinds for p in table}
    check_fit({name: shape for name, shape in found.items() if name.startswith("model/")}, expected, prefix)

    def read(name):
        with _told(prefix):
            return reader.get_tensor(name)

    def tree(kind):
        return unflatten({p.path: jnp.asarray(read(p.tensorflow + kind), jnp.float32) for p in table})

    step = jnp.asarray(read("global_step") if "global_step" in found else 0, jnp.int32)
    params = tree(PARAMS)
    state = dataclasses.replace(state_from_params(experiment, params), step=step, ema_params=tree(EMA))
    if MOMENT_1 in kinds:
        moments = {"count": step, "mu": tree(MOMENT_1), "nu": tree(MOMENT_2)}
        state = dataclasses.replace(state, opt_state=optax.tree.set(state.opt_state, **moments))
    return state, sorted(name for name in found if name not in expected and name != "global_step")


def _reader(prefix: str) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow logs its start at length
    tensorflow = import_extra("tensorflow", "tensorflow", f"the checkpoint {prefix}")
    return tensorflow.train.load_checkpoint(prefix)


@contextlib.contextmanager
def _told(prefix: str) -> Iterator[None]:
    """Turns any error of TensorFlow into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{prefix} cannot be read as a TensorFlow checkpoint ({first_line(error)}); give the path of its files "
            "without .index or .data, all of them whole"
        ) from None
