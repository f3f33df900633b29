"""The authors' TensorFlow checkpoints: parameters, their moving averages, and Adam's moments, by the names of their code.

    model/down_1/attn_0/q/W                              a parameter
    model/down_1/attn_0/q/W/ExponentialMovingAverage     its moving average
    model/down_1/attn_0/q/W/Adam, .../Adam_1             Adam's first and second moment, if they were kept
    global_step                                          the step, 0 if it was not kept

TensorFlow (the extra `tensorflow`) reads the files, and is imported for nothing else.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import optax

from ddpm_jax.config import check
from ddpm_jax.errors import UsageError, first_line, import_extra
from ddpm_jax.interop.names import check_fit, parameters, unflatten
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import TrainState, state_from_params

PARAMS, EMA, MOMENT_1, MOMENT_2 = "", "/ExponentialMovingAverage", "/Adam", "/Adam_1"


def read_checkpoint(prefix: str, experiment: Experiment) -> tuple[TrainState, list[str]]:
    """The training state of a checkpoint of the experiment's network, and the names of its variables that were not used.

    prefix: the path up to `.index`. Every variable under `model/` is used exactly once; others than global_step (Adam's
    powers of beta, say) are not. Without Adam's moments the optimizer starts anew, with its warm-up. Raises UsageError if the
    config cannot be run, the checkpoint cannot be read, or a variable is missing, too many or of another shape.
    """
    check(experiment.config)
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
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it reports its own start at length
    tensorflow = import_extra("tensorflow", "tensorflow", f"the checkpoint {prefix}")
    return tensorflow.train.load_checkpoint(prefix)


@contextlib.contextmanager
def _told(prefix: str) -> Iterator[None]:
    """Tells whatever TensorFlow raises, which has kinds of its own for what is missing and what is damaged, in a sentence."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{prefix} cannot be read as a TensorFlow checkpoint ({first_line(error)}); give the path of its files "
            "without .index or .data, all of them whole"
        ) from None
