"""The folder that everything of a run lies in, and the run that can be loaded back from it.

WORKDIR/config.json      the resolved config
WORKDIR/checkpoints/     see checkpoint.py
WORKDIR/metrics.jsonl    every logged scalar
WORKDIR/events/          the same for TensorBoard
WORKDIR/samples/         sample grids
WORKDIR/lock             while it is trained: by which process
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ddpm_jax import config as configs
from ddpm_jax import sharding
from ddpm_jax.checkpoint import Checkpoints, manifest_digest, saved_steps
from ddpm_jax.config import Config
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.errors import RunError, UsageError
from ddpm_jax.files import LOCK, is_remnant, open_folder, read_json, remove_remnants, sole_writer, write_text
from ddpm_jax.models.unet import UNet
from ddpm_jax.reporting import METRICS, best_step
from ddpm_jax.training import TrainState, build_schedule, build_unet, init_state

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"


def read_config(workdir: epath.Path) -> Config:
    """The config of a workdir. Raises UsageError if it is none, or its config cannot be read or used."""
    if not workdir.exists():
        raise UsageError(f"{workdir} does not exist; give the folder of a run that train.py made")
    if not workdir.is_dir():
        raise UsageError(f"{workdir} is a file; give the folder of a run that train.py made")
    path = workdir / CONFIG
    if not path.exists():
        raise UsageError(f"{workdir} has no {CONFIG}; give the folder of a run that train.py made")
    values = read_json(path)
    try:
        config = configs.from_json(values)
        configs.check(config, num_devices=None)
    except configs.ConfigError as error:
        raise UsageError(
            f"{path} cannot be used ({error}); restore it from a copy, or write what the run had there"
        ) from None
    return config


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
    """Makes the workdir if it is not there, and is its only writer while the block runs; left empty, it goes again.

    Of several processes the first one holds it for all. Raises UsageError at once where another run does.
    """
    with contextlib.ExitStack() as stack:
        sharding.first_decides(lambda: _hold(workdir, stack))
        yield


def _hold(workdir: epath.Path, stack: contextlib.ExitStack) -> int:
    if not workdir.exists():
        _make(workdir)
        stack.callback(_remove_empty, workdir)
    if workdir.is_dir():  # `enter` refuses what is none
        stack.enter_context(sole_writer(workdir))
        for name in (CONFIG, METRICS):  # not all: evaluate.py may be writing beside
            remove_remnants(workdir, name)
    return 0


def _remove_empty(workdir: epath.Path) -> None:
    if workdir.is_dir() and not any(workdir.iterdir()):
        workdir.rmdir()


def check_there(workdir: epath.Path) -> None:
    """Raises RunError, on all processes, where the workdir of a run was deleted or moved away meanwhile."""
    if not sharding.first_decides((workdir / CONFIG).exists):
        raise RunError(
            f"the workdir {workdir} or its {CONFIG} was deleted or moved while it was trained, so nothing more can be saved "
            "there; put it back, or start in another workdir"
        )


def enter(workdir: epath.Path, config: Config) -> None:
    """Makes the workdir this config's: creates it, or checks that it is, or refuses with the fields that differ.

    Before its first checkpoint a workdir takes any config, so that one that did not work can be put right.
    """
    sharding.first_decides(lambda: _enter(workdir, config))


def _enter(workdir: epath.Path, config: Config) -> int:
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"the workdir {workdir} is a file; choose another path")
    if (workdir / CONFIG).exists():
        old = read_config(workdir)
        fixed = [name for name in configs.differences(old, config) if name not in configs.MAY_CHANGE]
        if fixed and saved_steps(workdir / CHECKPOINTS):
            was, now = configs.flatten(old), configs.flatten(config)
            fields = ", ".join(f"{name} (there {was[name]!r}, here {now[name]!r})" for name in fixed)
            raise UsageError(
                f"the workdir {workdir} belongs to another config, which differs in {fields}; choose another workdir"
            )
        if old == config:
            return 0
    elif workdir.exists() and not all(path.name == LOCK or is_remnant(path, CONFIG) for path in workdir.iterdir()):
        raise UsageError(f"the workdir {workdir} has files but no {CONFIG}; choose an empty or a new folder")
    _write_config(workdir, config)
    return 0


def _write_config(workdir: epath.Path, config: Config) -> None:
    _make(workdir)
    try:
        write_text(workdir / CONFIG, json.dumps(configs.to_json(config), indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"the workdir {workdir} cannot be written ({error}); choose another path") from None


def _make(workdir: epath.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the workdir {workdir} cannot be written ({error}); choose another path") from None


def check_empty(path: epath.PathLike) -> None:
    """Refuses a folder that holds anything, so that nothing is overwritten. Raises UsageError."""
    folder = open_folder(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; choose a new folder")


def write_run(workdir: epath.PathLike, config: Config, state: TrainState) -> None:
    """Makes a workdir of the config with the state as its one checkpoint; it remembers no data set, so any may follow.

    Raises UsageError if the workdir is not empty, RunError if saving fails; then nothing is left of it.
    """
    workdir = epath.Path(workdir)
    check_empty(workdir)
    try:
        checkpoints = Checkpoints(workdir / CHECKPOINTS, config=config)
        try:
            checkpoints.save(state, {"data": None, "since_log": {}})
        finally:
            checkpoints.close()
        _write_config(workdir, config)  # last: without it the folder is no workdir, wherever this was killed
    except BaseException:
        workdir.rmtree(missing_ok=True)
        raise


@dataclass(frozen=True)
class Run:
    """A trained run: all it takes to sample from it."""

    config: Config
    step: int
    checkpoint: str  # SHA-256 of its manifest, "" if it has none
    weights: str  # what params are: "ema" or "raw"
    params: Any
    schedule: Schedule
    unet: UNet
    mesh: Mesh

    def model(self, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The network's output at (x_t, t), with the run's parameters and without dropout."""
        return jnp.asarray(self.unet.apply({"params": self.params}, x_t, t))


def load_run(
    workdir: epath.PathLike,
    *,
    step: int | Literal["best"] | None = None,
    weights: str = "ema",
    unverified: bool = False,
    mesh: Mesh | None = None,
) -> Run:
    """The run of a workdir at its newest intact checkpoint, or at `step`; parameters and config checked byte for byte.

    step: "best" is the one at which train.keep_best was least (see train.eval_every). weights: "ema", or "raw" for the
    parameters as the optimizer left them. unverified: skip the check. mesh: where the parameters go, default all devices.
    Executes nothing of the workdir's. Raises UsageError where there is no such run, checkpoint or kind of weights.
    """
    if weights not in ("ema", "raw"):
        raise UsageError(f"got weights {weights!r}, expected ema or raw")
    workdir = open_folder(workdir)
    config = read_config(workdir)
    if step == "best":
        step = best_step(workdir, config.train.keep_best, saved_steps(workdir / CHECKPOINTS))
        if step is None:
            raise UsageError(f"{workdir} has no {config.train.keep_best} yet; set train.eval_every, or give a step")
    checkpoints = Checkpoints(workdir / CHECKPOINTS, config=config)
    try:
        items = ("ema",) if weights == "ema" else ("state", "ema")
        chosen = checkpoints.choose(step=step, unverified=unverified, items=items)
        if chosen is None:
            raise UsageError(f"{workdir} has no checkpoint yet; train longer, or give another workdir")
        mesh = sharding.make_mesh() if mesh is None else mesh
        shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
        everywhere = sharding.replicated(mesh)
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes)
        if weights == "ema":
            params = checkpoints.restore_ema(chosen, like.ema_params)
        else:
            params = checkpoints.restore_state(chosen, like).params
    finally:
        checkpoints.close()
    manifest = manifest_digest(workdir / CHECKPOINTS / str(chosen))
    return Run(config, chosen, manifest, weights, params, build_schedule(config), build_unet(config), mesh)
