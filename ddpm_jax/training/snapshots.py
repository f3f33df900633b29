"""Snapshots of the power-function averages, and the average of any width rebuilt from them.

    WORKDIR/snapshots/STEP.safetensors   the averages of train.ema_widths at a step, as "0.05/down_1_attn_0/q/kernel"

They are written at every train.save_every and at the end, and stay when the checkpoint goes. Each has a digest of itself and the
config's fixed fields in its metadata.
"""

import json

import jax
import numpy as np
from etils import epath
from safetensors.numpy import save

from ddpm_jax.config import Config, changed_fields, fixed_fields
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import DamagedFileError, digest, read_bytes, remove_remnants, write_bytes
from ddpm_jax.training.loop import Evaluator, Findings
from ddpm_jax.training.metric_writer import read_metrics
from ddpm_jax.training.parameters import ENDING, MOST_BYTES, arrays_digest, flatten, parse_arrays
from ddpm_jax.training.posthoc import Profile, fit, gamma_of
from ddpm_jax.training.step import TrainState
from ddpm_jax.training.weights import WIDTHS

SNAPSHOTS = "snapshots"
MOST_ERROR = 0.1  # of a rebuilt profile; parameters that settle are then rebuilt to about a thousandth


class Snapshots:
    """Writes the power-function averages beside every checkpoint of train.save_every, and logs how many snapshots there are.

    The loop runs it as an evaluator, so that a resume makes up for a snapshot that a kill prevented.
    """

    name, doing = "ema_snapshots", "writing the averages"

    def __init__(self, workdir: epath.Path, config: Config):
        self.folder, self.config, self.every = workdir / SNAPSHOTS, config, config.train.save_every

    def __call__(self, state: TrainState) -> Findings:
        """Writes the snapshot of the state's step. All processes must call it."""
        averages = state.averages or {}
        widths = {name.removeprefix(WIDTHS): a for name, a in averages.items() if name.startswith(WIDTHS)}
        arrays = flatten(sharding.to_host(widths))
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(_path(self.folder, int(state.step)), _content(int(state.step), self.config, arrays))
        return Findings({self.name: len(snapshot_steps(self.folder))}, {})


def make_snapshots(workdir: epath.Path, config: Config, *, last_step: int) -> tuple[Evaluator, ...]:
    """The evaluator that writes snapshots, after removing those of a future that will be trained again.

    Args:
        workdir: The folder of the run.
        config: The run's config.
        last_step: The step that the training starts from; later snapshots are removed.

    Returns:
        One `Snapshots`, or none without train.ema_widths.
    """

    def cut() -> None:
        remove_remnants(workdir / SNAPSHOTS)
        for step in snapshot_steps(workdir / SNAPSHOTS):
            if step > last_step:
                _path(workdir / SNAPSHOTS, step).unlink()

    if not config.train.ema_widths:
        return ()
    sharding.first_decides(cut)
    return (Snapshots(workdir, config),)


def snapshot_steps(folder: epath.Path) -> list[int]:
    """The steps of the snapshots in a folder, in order, intact or not."""
    names = [path.name.removesuffix(ENDING) for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal() and _path(folder, int(name)).exists())


def _path(folder: epath.Path, step: int) -> epath.Path:
    return folder / f"{step:08d}{ENDING}"


def _content(step: int, config: Config, arrays: dict[str, np.ndarray]) -> bytes:
    about = {"step": str(step), "config": json.dumps(fixed_fields(config), sort_keys=True)}
    return save(arrays, about | {"sha256": arrays_digest(about, arrays)})


def read_snapshot(folder: epath.Path, step: int, config: Config) -> tuple[str, dict[str, np.ndarray]]:
    """The digest and the arrays of a snapshot. Raises DamagedFileError if it is not what was written, or of another run."""
    path = _path(folder, step)
    arrays, about = parse_arrays(path, read_bytes(path, most=MOST_BYTES))
    proof = about.pop("sha256", None)
    if proof is None or proof != arrays_digest(about, arrays):
        raise DamagedFileError(path, "it does not agree with its own digest")
    if int(about["step"]) != step:
        raise DamagedFileError(path, f"it is a copy of step {about['step']}")
    if changed := changed_fields(json.loads(about["config"]), config):
        raise DamagedFileError(path, f"it is of another config, which differs in {', '.join(changed)}")
    return proof, arrays


def rebuild(
    workdir: epath.Path, config: Config, width: float, *, step: int | None = None, unverified: bool = False
) -> bytes:
    """The power-function average of a relative width, as .safetensors.

    Args:
        workdir: The folder of the run.
        config: The run's config.
        width: The relative width.
        step: The snapshot at which the average ends; default the newest.
        unverified: Do without snapshots that are missing.

    Returns:
        The parameters by path, float32, with the metadata `step` and `checkpoint`, a digest of all that they depend on.

    Raises:
        UsageError: If snapshots are missing or damaged, or the width is too far from those of the snapshots.
    """
    folder, widths = workdir / SNAPSHOTS, config.train.ema_widths
    steps = _usable(workdir, step, unverified)
    if width in widths:
        steps = steps[-1:]  # which holds it
    profiles = [Profile(gamma_of(w), s) for s in steps for w in widths]
    coefficients, error = fit(profiles, Profile(gamma_of(width), steps[-1]))
    if error > MOST_ERROR:
        raise UsageError(
            f"the width {width} cannot be rebuilt from {len(steps)} snapshots of the widths {', '.join(map(str, widths))}, since "
            f"its profile would be off by {error:.0%}; give a width nearer to these, or train with a smaller train.save_every"
        )
    proofs: dict[int, str] = {}
    total: dict[str, np.ndarray] = {}
    for at, weights in zip(steps, coefficients.reshape(len(steps), len(widths)), strict=True):
        proofs[at], arrays = read_snapshot(folder, at, config)
        for name, array in arrays.items():
            of, path = name.split("/", 1)
            total[path] = total.get(path, 0) + weights[widths.index(float(of))] * array.astype(np.float64)
    about = {"step": str(steps[-1]), "checkpoint": digest({"width": width, "snapshots": proofs})}
    return save({path: array.astype(np.float32) for path, array in total.items()}, about)


def _usable(workdir: epath.Path, step: int | None, unverified: bool) -> list[int]:
    """The steps of the snapshots up to a step, or of all."""
    folder = workdir / SNAPSHOTS
    steps = snapshot_steps(folder)
    if not steps:
        raise UsageError(f"{workdir} has no snapshots of averages yet; train longer")
    if step is not None and step not in steps:
        raise UsageError(f"{folder} has no snapshot of step {step}; those there are {', '.join(map(str, steps))}")
    used = [s for s in steps if step is None or s <= step]
    logged = {line["step"] for line in read_metrics(workdir) if Snapshots.name in line}
    missing = sorted(s for s in logged - set(steps) if step is None or s < step)
    if missing and not unverified:
        more = f", and {len(missing) - 1} more are" if missing[1:] else ""
        raise UsageError(
            f"{_path(folder, missing[0])} is missing{more}; restore it from a copy, or do without by --unverified"
        )
    return used
