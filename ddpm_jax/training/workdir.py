"""The workdir, which holds everything of a run, and loading a run from it.

WORKDIR/config.json      the resolved config
WORKDIR/checkpoints/     see checkpoint.py
WORKDIR/metrics.jsonl    every logged scalar
WORKDIR/events/          the same for TensorBoard
WORKDIR/reference/       the curve of the shipped result of this config, if there is one, for TensorBoard
WORKDIR/samples/         sample grids
WORKDIR/snapshots/       see snapshots.py
WORKDIR/lock             while it is trained: which process trains it
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ddpm_jax.config import Config, TrainConfig, changeable, differences, to_json
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.core.files import (
    LOCK,
    DamagedFileError,
    is_remnant,
    open_folder,
    remove_remnants,
    sole_writer,
    write_text,
)
from ddpm_jax.models.unet import UNet
from ddpm_jax.training import ema
from ddpm_jax.training.checkpoint import (
    Checkpoints,
    finished_steps,
    keep_for_good,
    manifest_digest,
    multiples,
    read_meta,
    saved_steps,
)
from ddpm_jax.training.config_json import CONFIG, read_config
from ddpm_jax.training.experiment import Experiment, Network
from ddpm_jax.training.metric_writer import METRICS, best_step
from ddpm_jax.training.parameters import (
    ENDING,
    check_fit,
    flatten,
    parse_arrays,
    parse_parameters,
    read_content,
    unflatten,
)
from ddpm_jax.training.shipped import PREFIX, pretrained_file
from ddpm_jax.training.snapshots import SNAPSHOTS, rebuild
from ddpm_jax.training.step import TrainState, abstract_state
from ddpm_jax.training.weights import canonical, check_tracked, width_of

CHECKPOINTS = "checkpoints"
MOST_NAMED = 10  # steps in a note
ITEMS_OF = {"ema": ("ema",), "raw": ("state", "ema", "averages")}  # of a checkpoint, by weights; else the averages


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
    """Creates the workdir if needed, and locks it while the block runs. A new workdir that stays empty is removed.

    Process 0 holds the lock for all. Raises UsageError at once if another run holds it.
    """
    with contextlib.ExitStack() as stack:
        sharding.first_decides(lambda: _hold(workdir, stack))
        yield


def _hold(workdir: epath.Path, stack: contextlib.ExitStack) -> None:
    if not workdir.exists():
        with _writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        stack.callback(_remove_empty, workdir)
    if workdir.is_dir():  # `enter` refuses a file
        stack.enter_context(sole_writer(workdir))
        for name in (CONFIG, METRICS):  # only these: evaluate.py may be writing others
            remove_remnants(workdir, name)


def _remove_empty(workdir: epath.Path) -> None:
    if workdir.is_dir() and not any(workdir.iterdir()):
        workdir.rmdir()


def check_there(workdir: epath.Path) -> None:
    """Raises RunError on all processes if the workdir was deleted or moved during the run."""
    if not sharding.first_decides((workdir / CONFIG).exists):
        raise RunError(
            f"the workdir {workdir} or its {CONFIG} was deleted or moved while it was trained, so nothing more can be saved "
            "there; put it back, or start in another workdir"
        )


def enter(workdir: epath.Path, config: Config, *, own_network: bool = False) -> None:
    """Writes the config into the workdir. Raises UsageError with the fields that differ if it belongs to another config.

    Before its first checkpoint a workdir accepts any config, so that a config that failed can be corrected. Later, a note names
    the fields that change. Checkpoints that the config there keeps and this one would delete stay for good.
    """
    sharding.first_decides(lambda: _enter(workdir, config, own_network))


def _enter(workdir: epath.Path, config: Config, own_network: bool) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UsageError(f"the workdir {workdir} is a file; choose another path")
    if (workdir / CONFIG).exists():
        old = read_config(workdir, own_network=own_network)
        if old == config:
            return
        changes, saved = differences(old, config), saved_steps(workdir / CHECKPOINTS)
        fixed = {name: values for name, values in changes.items() if name not in changeable()}
        if fixed and saved:
            fields = ", ".join(f"{name} (there {was!r}, here {now!r})" for name, (was, now) in fixed.items())
            raise UsageError(
                f"the workdir {workdir} belongs to another config, which differs in {fields}; choose another workdir"
            )
        if saved:
            told = ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changes.items())
            tqdm.write(f"Note: the run goes on with other options than before: {told}.")
            _keep(workdir, old.train, config.train)
    elif workdir.exists() and not all(path.name == LOCK or is_remnant(path, CONFIG) for path in workdir.iterdir()):
        raise UsageError(f"the workdir {workdir} has files but no {CONFIG}; choose an empty or a new folder")
    _write_config(workdir, config)


def _keep(workdir: epath.Path, old: TrainConfig, new: TrainConfig) -> None:
    """Keeps for good what the old options keep of the checkpoints that are there, where the new ones keep less.

    A command that forgets an option must not cost the checkpoints that an earlier one was told to keep.
    """
    steps, stay = finished_steps(workdir / CHECKPOINTS), set[int | None]()
    if new.keep_last < old.keep_last:
        stay |= set(steps[-old.keep_last :])
    if old.keep_every and not (new.keep_every and old.keep_every % new.keep_every == 0):
        stay |= set(multiples(steps, old.keep_every))
    if new.keep_best != old.keep_best:
        stay.add(best_step(workdir, old.keep_best, steps))
    if kept := sorted(step for step in stay if step is not None):
        keep_for_good(workdir / CHECKPOINTS, kept)
        named = (
            ", ".join(map(str, kept)) if len(kept) <= MOST_NAMED else f"{kept[0]} to {kept[-1]} ({len(kept)} of them)"
        )
        tqdm.write(
            f"Note: the checkpoints of the steps {named}, which the options before were to keep, stay "
            f"beside those of the new options; delete their folders in {workdir / CHECKPOINTS} if you do not need them."
        )


def _write_config(workdir: epath.Path, config: Config) -> None:
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / CONFIG, json.dumps(to_json(config), indent=2) + "\n")


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    """Turns an error of the file system into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"the workdir {workdir} cannot be written ({error}); choose another path") from None


def check_empty(path: epath.PathLike) -> None:
    """Raises UsageError unless the folder is empty or new, so that nothing is overwritten."""
    folder = open_folder(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; choose a new folder")


def write_run(workdir: epath.PathLike, experiment: Experiment, state: TrainState, classes: Sequence[str] = ()) -> None:
    """Creates a workdir with the state as its only checkpoint. It records no data set, so training may use any.

    classes: their names, if they are known.

    Raises UsageError if the workdir is not empty, and RunError if saving fails; the workdir is then removed.
    """
    workdir, config = epath.Path(workdir), experiment.config
    check_empty(workdir)
    try:
        checkpoints = Checkpoints(workdir / CHECKPOINTS, config=config)
        try:
            meta: dict[str, Any] = {"data": None, "since_log": {}, "network": network_name(experiment)}
            checkpoints.save(state, meta | ({"classes": list(classes)} if classes else {}))
        finally:
            checkpoints.close()
        _write_config(workdir, config)  # last: after a kill, a folder without it is no workdir
    except BaseException:
        workdir.rmtree(missing_ok=True)
        raise


def network_name(experiment: Experiment) -> str:
    """The name of the network's class, which a checkpoint records."""
    return type(experiment.network).__name__


def check_network(meta: dict[str, Any], experiment: Experiment) -> None:
    """Raises UsageError if a checkpoint was trained with another network. Earlier versions recorded none: the U-Net."""
    trained = meta.get("network", UNet.__name__)
    if trained != network_name(experiment):
        raise UsageError(
            f"the checkpoint is of the network {trained}, got {network_name(experiment)}; give the network that was trained, "
            "network= of load_run or Experiment.from_config"
        )


def data_of(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The identity of the data set that a run was trained on, by its newest checkpoint; None if that says nothing.

    Reads a file and no more, so one of several processes may ask alone.
    """
    return _newest_meta(workdir).get("data")


def classes_of(workdir: epath.PathLike) -> list[str]:
    """The names of the classes that a run has had, by its newest checkpoint; none if that says nothing. Reads as `data_of`."""
    return list(_newest_meta(workdir).get("classes") or [])


def _newest_meta(workdir: epath.PathLike) -> dict[str, Any]:
    checkpoints = epath.Path(workdir) / CHECKPOINTS
    steps = saved_steps(checkpoints)
    with contextlib.suppress(OSError, DamagedFileError, KeyError, TypeError):
        return dict(read_meta(checkpoints / str(steps[-1]))) if steps else {}
    return {}


@dataclass(frozen=True)
class Run:
    """A trained run, ready to sample, evaluate and export.

    Attributes:
        experiment: What was trained.
        step: The step of the checkpoint.
        checkpoint: SHA-256 of its manifest, of the file that it was loaded from, or of the snapshots; "" if it has none.
        weights: Which parameters: "ema", "raw", "ema:0.999" or "width:0.15" (`load_run`).
        params: The network's parameters, on the mesh.
        mesh: The devices.
        classes: The classes' names, if there are classes and they have names.
        guide: Another run that guides this one's samples (`generation.generator.with_guide`).
        given: Pictures that its samples are drawn from (`generation.given.with_given`).

    Example:
        >>> from ddpm_jax import Run
        >>> Run.__dataclass_fields__["params"].name    # load_run makes one from a workdir
        'params'
    """

    experiment: Experiment
    step: int
    checkpoint: str
    weights: str
    params: Any
    mesh: Mesh
    classes: tuple[str, ...] = ()
    guide: "Run | None" = None
    given: Any = None

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.experiment.config

    @property
    def note(self) -> str:
        """One sentence, with the remedy, if the parameters are an EMA that is of little use; else ""."""
        return ema.note(self.config.train, self.step, self.weights)

    def model(
        self,
        x_t: jax.Array,
        t: jax.Array,
        labels: jax.Array | int | None = None,
        condition: jax.Array | None = None,
    ) -> jax.Array:
        """The network's output at (x_t, t), with the run's parameters and without dropout.

        labels: the classes, int (B,), or one for all; default no class. condition: that of each image (`Experiment.model`).
        """
        return self.experiment.model(self.params, labels=labels, condition=condition)(x_t, t)


def load_run(
    workdir: epath.PathLike,
    *,
    step: int | Literal["best"] | None = None,
    weights: str = "ema",
    unverified: bool = False,
    mesh: Mesh | None = None,
    network: Network | None = None,
) -> Run:
    """Loads a run from its workdir, at its newest intact checkpoint, or from a file of its parameters.

    Checks the parameters and the config against the checkpoint's manifest. Executes no code of the workdir.

    Args:
        workdir: The folder of a run, pretrained:NAME, or a .safetensors file that `ddpm-jax convert export` made.
        step: Another checkpoint's step; "best": where train.keep_best was least (see train.eval_every).
        weights: "ema"; "raw" for the parameters of the optimizer; "ema:0.999" for one of train.ema_decays; "width:0.15" for the
            power-function average of this relative width, if the run has train.ema_widths.
        unverified: Skip the check.
        mesh: The devices of the parameters; default all devices.
        network: Your own network, if the run was trained with one.

    Returns:
        The `Run`.

    Raises:
        UsageError: If the run, the checkpoint or the kind of weights does not exist.

    Example:
        >>> from ddpm_jax import load_run
        >>> run = load_run("runs/digits")    # doctest: +SKIP
        >>> run.model(x_t, t)    # doctest: +SKIP
    """
    weights = canonical(weights)
    if is_parameters(workdir):
        return _load_parameters(str(workdir), step=step, weights=weights, mesh=mesh, network=network)
    workdir = open_folder(workdir)
    config = read_config(workdir, own_network=network is not None)
    check_tracked(weights, config.train)
    if step == "best":
        step = _best(workdir, config.train.keep_best)
    experiment, width = Experiment.from_config(config, network), width_of(weights)
    with contextlib.closing(Checkpoints(workdir / CHECKPOINTS, config=config)) as checkpoints:
        # For a rebuilt average the newest checkpoint only tells what the run is.
        items = ("meta", *(ITEMS_OF.get(weights, ("averages",)) if width is None else ()))
        chosen = checkpoints.choose(step=step if width is None else None, unverified=unverified, items=items)
        if chosen is None:
            raise UsageError(f"{workdir} has no checkpoint yet; train longer, or give another workdir")
        mesh, meta = sharding.make_mesh() if mesh is None else mesh, checkpoints.restore_meta(chosen)
        check_network(meta, experiment)
        like = abstract_state(experiment, sharding.make_mesh(devices=list(mesh.devices.flat)))
        if width is None:
            params, proof = _restore(checkpoints, chosen, like, weights), manifest_digest(checkpoints.folder(chosen))
        else:
            read = functools.partial(rebuild, workdir, config, width, step=step, unverified=unverified)
            arrays, about = parse_arrays(workdir / SNAPSHOTS, sharding.first_gives(read) or b"")
            params, chosen = _placed(arrays, like.ema_params, workdir / SNAPSHOTS), int(about["step"])
            proof = about["checkpoint"]
    return Run(experiment, chosen, proof, weights, params, mesh, tuple(meta.get("classes", ())))


def _best(workdir: epath.Path, name: str) -> int:
    """The saved step at which a number was least, with a note if it was less at one that is not saved any more."""
    step = best_step(workdir, name, saved_steps(workdir / CHECKPOINTS))
    if step is None:
        raise UsageError(f"{workdir} has no {name} yet; set train.eval_every, or give a step")
    least = best_step(workdir, name)
    if least != step and jax.process_index() == 0:
        print(
            f"Note: {name} was least at step {least}, which is not saved any more; step {step} is the best that is saved."
        )
    return step


def _restore(checkpoints: Checkpoints, step: int, like: TrainState, weights: str) -> Any:
    """These parameters of a step, as in `like`, a state of ShapeDtypeStructs."""
    if weights == "ema":
        return checkpoints.restore_item(step, "ema", like.ema_params)
    if weights == "raw":
        return checkpoints.restore_state(step, like).params
    return checkpoints.restore_item(step, "averages", like.averages)[weights]


def _placed(arrays: dict[str, Any], like: Any, where: object) -> Any:
    """Arrays by path as parameters like `like`, on its devices. Raises UsageError if they do not fit. where: their file."""
    shapes = {path: array.shape for path, array in flatten(like).items()}
    check_fit({path: array.shape for path, array in arrays.items()}, shapes, where)
    return jax.tree.map(lambda array, a: jax.device_put(array, a.sharding), unflatten(arrays), like)


def is_parameters(name: epath.PathLike) -> bool:
    """Whether what stands in a workdir's place is parameters: pretrained:NAME, or a file with their ending."""
    name = os.fspath(name)
    return name.startswith(PREFIX) or (name.endswith(ENDING) and not open_folder(name).is_dir())


def folder_of_outputs(name: epath.PathLike) -> str:
    """The folder for what is made of a run: WORKDIR/generated, or generated/NAME here, if it is a file of parameters."""
    if not is_parameters(name):
        return f"{os.fspath(name)}/generated"
    return f"generated/{os.path.basename(os.fspath(name)).removeprefix(PREFIX).removesuffix(ENDING)}"


def _load_parameters(
    name: str, *, step: int | Literal["best"] | None, weights: str, mesh: Mesh | None, network: Network | None
) -> Run:
    """The run of a file of parameters."""

    def read() -> bytes:
        return read_content(pretrained_file(name) if name.startswith(PREFIX) else open_folder(name))

    content = sharding.first_gives(read) or b""
    stored = parse_parameters(epath.Path(name), content)
    if step not in (None, stored.step):
        raise UsageError(f"{name} holds the parameters of step {stored.step}, not of step {step}; leave out the step")
    if weights != stored.weights and (weights != "ema" or stored.weights == "raw"):  # any average is the file's EMA
        raise UsageError(f"{name} holds the {stored.weights} parameters; ask for --weights {stored.weights}")
    experiment = Experiment.from_config(stored.config, network)
    mesh = sharding.make_mesh() if mesh is None else mesh
    like = abstract_state(experiment, sharding.make_mesh(devices=list(mesh.devices.flat))).ema_params
    params = _placed(stored.arrays, like, name)
    proof = hashlib.sha256(content).hexdigest()
    return Run(experiment, stored.step, proof, stored.weights, params, mesh, stored.classes)
