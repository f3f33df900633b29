"""A run reduced to a result that the package ships: config, command, hardware, time, curve, evaluations, samples, weights.

`training/shipped.py` says which files it has. A result's curve is of several runs where those of other seeds are given too.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from ddpm_jax.config import to_json
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import digest, fingerprint, write_bytes, write_text
from ddpm_jax.core.provenance import commit
from ddpm_jax.data.sheets import enlarge, grid, png_bytes
from ddpm_jax.evaluation.evaluation import software
from ddpm_jax.evaluation.metrics import step_of
from ddpm_jax.evaluation.reference import held_out_of, is_repeated, losses_of, make_curve
from ddpm_jax.evaluation.results import read_results
from ddpm_jax.generation.generator import draw, make_generator, sample_key
from ddpm_jax.interop.export import parameters_file
from ddpm_jax.training.config_json import read_config
from ddpm_jax.training.metric_writer import read_metrics
from ddpm_jax.training.shipped import RESULT, SAMPLES, WEIGHTS
from ddpm_jax.training.workdir import Run, check_empty, data_of

NUM_SAMPLES = 64


def seconds_of(lines: Sequence[dict[str, Any]]) -> float:
    """The time that a run's logged steps took, without evaluations and saves' waiting, by its speed in each line."""
    steps = [0, *(line["step"] for line in lines if "steps_per_s" in line)]
    speeds = [line["steps_per_s"] for line in lines if "steps_per_s" in line]
    return float((np.diff(steps) / np.array(speeds)).sum())


def first_samples(run: Run) -> UInt8[np.ndarray, "N H W C"]:
    """The first 64 samples of seed 0, as `sample.py` draws them; float32 images as 8-bit pictures."""
    generate, size = make_generator(run.experiment, run.mesh), sharding.round_up(NUM_SAMPLES, run.mesh.devices.size)
    images = draw(generate, run.params, sample_key(0), range(NUM_SAMPLES), size=size)
    return run.experiment.pixels.to_pictures(np.asarray(images)[:NUM_SAMPLES])


def read_logs(workdirs: Sequence[epath.Path]) -> list[list[dict[str, Any]]]:
    """The logs of runs of one config on the same data. Raises UsageError if they are not, or one has logged no loss."""
    first, data = read_config(workdirs[0]), data_of(workdirs[0])
    logs = []
    for workdir in workdirs:
        if not is_repeated(first, read_config(workdir)):
            raise UsageError(
                f"{workdir} has another config than {workdirs[0]}; give runs that differ by the seed alone"
            )
        if data_of(workdir) != data:
            raise UsageError(f"{workdir} was trained on other data than {workdirs[0]}; give runs of the same data")
        logs.append(read_metrics(workdir))
        if not losses_of(logs[-1]):
            raise UsageError(f"{workdir} has no losses in its log; train it until its first line of metrics.jsonl")
    return logs


def write_result(run: Run, folder: epath.Path, workdirs: Sequence[epath.Path], *, command: str, hardware: str) -> None:
    """Writes the result of a run into a new folder.

    Args:
        run: The run, by its EMA parameters.
        folder: The folder, results/NAME say.
        workdirs: The run's own workdir, then those of runs of the same config and data with other seeds.
        command: What trained it.
        hardware: What it was trained on, in words.

    Raises:
        UsageError: If the folder is not empty, or the runs do not go together.
    """
    run.experiment.check_unconditional("a result, whose samples are of no picture,")
    check_empty(folder)
    logs = read_logs(workdirs)
    samples, weights = png_bytes(enlarge(grid(first_samples(run)))), parameters_file(run)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / SAMPLES, samples)
    write_bytes(folder / WEIGHTS, weights)
    result = {
        "config": to_json(run.config),
        "command": command,
        "hardware": hardware,
        "software": software(run.mesh) | ({"commit": written_at} if (written_at := commit()) else {}),
        "data": data_of(workdirs[0]),
        "step": run.step,
        "parameters": sum(array.size for array in jax.tree.leaves(run.params)),
        "seeds": [read_config(workdir).seed for workdir in workdirs],
        "seconds": [round(seconds_of(lines), 1) for lines in logs],
        "curve": vars(make_curve(logs)),
        "held_out": held_out_of(logs[0]),
        "evaluations": [result for result in read_results(workdirs[0])[0] if step_of(result) == run.step],
        "files": {name: fingerprint(folder / name) for name in (SAMPLES, WEIGHTS)},
    }
    write_text(
        folder / RESULT, json.dumps(result | {"sha256": digest(result)}, indent=1) + "\n"
    )  # last: it proves the others
