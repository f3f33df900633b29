"""One recipe trained by ddpm_jax and by PyTorch with other seeds: do losses and samples agree? make torch-training

WORKDIR/ddpm_jax_SEED/       a run
WORKDIR/pytorch_SEED/        ema/ and raw/, models of diffusers
WORKDIR/SIDE_SEED.json       what was measured of it; a finished run is not repeated

The result is comparison.json beside this script, and the page docs/torch_training.md that says it in words.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from etils import epath
from jax.sharding import Mesh
from report import SIDES, page, welch

from ddpm_jax import Config, Experiment, load_run, train
from ddpm_jax import config as configs
from ddpm_jax.benchmark.timing import processor
from ddpm_jax.commands.cli import run as run_command
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.core.errors import UsageError, import_extra
from ddpm_jax.core.files import digest, read_json, write_text
from ddpm_jax.core.sharding import make_mesh
from ddpm_jax.data import open_source
from ddpm_jax.evaluation.evaluation import Evaluation, Programs, software
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.metrics import METRICS
from ddpm_jax.evaluation.options import Options as EvaluationOptions
from ddpm_jax.evaluation.reference import losses_of
from ddpm_jax.evaluation.scores import frechet_distance, statistics
from ddpm_jax.generation.generator import batch_ranges, generate_batches, make_generator, sample_key
from ddpm_jax.interop.diffusers import read_model
from ddpm_jax.interop.diffusers_config import scheduler_config, unet_config
from ddpm_jax.training.loop import Interrupted
from ddpm_jax.training.metric_writer import read_metrics

HERE = Path(__file__).parent
WEIGHTS = {"ema": "EMA", "raw": "raw parameters"}
LAST = 5  # the last fifth of a training's steps is what its own mean loss is of
BATCH = 256


@dataclass(frozen=True)
class Options:
    """What is trained and measured, and where it is written."""

    steps: int = 5000
    """Training steps of configs/digits.py."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each side, two at least."""
    num_images: int = 1797
    """Samples of each run, drawn in all T steps."""
    workdir: Path = Path("runs/torch_training")
    """Where the runs are kept."""
    result: Path = HERE / "comparison.json"
    """The numbers."""
    page: Path = HERE.parent.parent / "docs" / "torch_training.md"
    """The numbers in words."""


class Trained(NamedTuple):
    """A finished training: its parameters ("ema", "raw"), its samples, and its own mean loss of the last steps."""

    params: dict[str, Any]
    samples: np.ndarray
    loss: float


def as_json(value: Any) -> Any:
    """A value as it is read back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))


def recipe(steps: int) -> Config:
    """configs/digits.py for so many steps."""
    config = load_config("digits")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, sample_every=0))


def mesh() -> Mesh:
    """One device, so that neither side has more."""
    return make_mesh(devices=jax.devices()[:1])


# ---- Two trainings


def train_ours(config: Config, folder: Path, num_images: int) -> Trained:
    """Trains with ddpm_jax in a workdir, which a repeated call continues."""
    experiment = Experiment.from_config(config)
    train(experiment, folder, mesh=mesh())
    params = {weights: load_run(folder, weights=weights, mesh=mesh()).params for weights in WEIGHTS}
    drawn = generate_batches(
        make_generator(experiment, mesh()),
        params["ema"],
        sample_key(config.seed),
        batch_ranges(range(num_images), batch_size=BATCH, num_devices=1),
        size=BATCH,
    )
    first = config.train.steps - config.train.steps // LAST
    loss = np.mean([loss for step, loss in losses_of(read_metrics(epath.Path(folder))).items() if step > first])
    return Trained(params, np.concatenate([images for _, images in drawn]), float(loss))


def train_torch(config: Config, folder: Path, num_images: int) -> Trained:
    """Trains with PyTorch from the start, and brings the weights here as any model of diffusers."""
    from torch_recipe import Training

    shutil.rmtree(folder, ignore_errors=True)
    experiment, steps = Experiment.from_config(config), config.train.steps
    images = np.asarray(open_source(config.data).images)
    training = Training(
        unet_config(experiment), scheduler_config(experiment), dataclasses.asdict(config.train), config.seed
    )
    losses, start = [], time.perf_counter()
    for loss in training.losses(images):
        losses.append(loss)
        done, every = len(losses), config.train.log_every
        if done % every == 0:
            speed, mean = done / (time.perf_counter() - start), np.mean(losses[-every:])
            print(
                f"PyTorch, seed {config.seed}: step {done:,} of {steps:,}, loss {mean:.4f}, {speed:.1f} steps/s",
                flush=True,
            )
        if done == steps:
            break
    params = {}
    for weights in WEIGHTS:
        training.pipeline(weights).save_pretrained(folder / weights)
        _, params[weights] = read_model(str(folder / weights), config)
    return Trained(params, training.samples(num_images), float(np.mean(losses[-(steps // LAST) :])))


TRAINERS: dict[str, Callable[[Config, Path, int], Trained]] = {"ddpm_jax": train_ours, "pytorch": train_torch}


# ---- One judge


class Judge:
    """Measures trainings of either side by the same programs, on the same images and draws."""

    def __init__(self, config: Config):
        self.source = open_source(config.data)
        self.programs = Programs(Experiment.from_config(config), mesh())
        self.real = statistics(PIXELS.compute(np.asarray(self.source.images))["features"])

    def measure(self, trained: Trained) -> dict[str, float]:
        """Each measure of a training by its name."""
        measured = {"training loss, last fifth of the steps, as logged": trained.loss}
        for weights, words in WEIGHTS.items():
            losses = METRICS["losses"](self._evaluation(trained.params[weights]))
            measured[f"loss, {words}"] = losses["value"]
            for i, quarter in enumerate(losses["quarters"].values(), 1):
                measured[f"loss, {words}, quarter {i} of t"] = quarter["value"]
        samples = statistics(PIXELS.compute(trained.samples)["features"])
        return measured | {"Fréchet distance of pixels, EMA": frechet_distance(samples, self.real)}

    def _evaluation(self, params: Any) -> Evaluation:
        return Evaluation(self.programs, params, self.source, PIXELS, EvaluationOptions(batch_size=BATCH), model={})


def run_of(side: str, config: Config, options: Options, judge: Judge) -> dict[str, Any]:
    """What was measured of a training, which is trained unless its file is there. Raises UsageError if that is of another."""
    path = epath.Path(options.workdir / f"{side}_{config.seed}.json")
    of = as_json({"config": configs.to_json(config), "images": options.num_images, "data": judge.source.identity})
    if path.exists():
        run = read_json(path)
        if run["of"] != of:
            raise UsageError(
                f"{path} is of another config or number of images; move it away, or give another --workdir"
            )
        print(f"{path} is there.", flush=True)
        return run
    start = time.process_time()
    measures = judge.measure(TRAINERS[side](config, options.workdir / f"{side}_{config.seed}", options.num_images))
    run = {"of": of, "cpu_seconds": round(time.process_time() - start), "measures": measures}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(run, indent=1) + "\n")
    print(f"{path} is written, after {run['cpu_seconds']:,} s of processor time.", flush=True)
    return run


# ---- The comparison


def compare(config: Config, options: Options) -> dict[str, Any]:
    """Trains and measures all runs that are not there, and compares the sides."""
    judge, runs = Judge(config), dict[str, list[dict[str, Any]]]()
    for seed in options.seeds:
        for side in SIDES:
            run = run_of(side, dataclasses.replace(config, seed=seed), options, judge)
            runs.setdefault(side, []).append(run)
    measured = {side: [run["measures"] for run in runs[side]] for side in SIDES}
    names = measured["ddpm_jax"][0]
    return {
        "config": configs.to_json(config),
        "seeds": list(options.seeds),
        "images": options.num_images,
        "data": judge.source.identity,
        "hardware": processor(),
        "software": software(mesh()) | {name: version(name) for name in ("torch", "diffusers")},
        "cpu_seconds": {side: [run["cpu_seconds"] for run in runs[side]] for side in SIDES},
        "measures": measured,
        "comparison": {name: welch(*([m[name] for m in measured[side]] for side in SIDES)) for name in names},
    }


def read_result(path: Path) -> dict[str, Any]:
    """The numbers of a comparison. Raises UsageError if they were changed by hand."""
    result = read_json(epath.Path(path))
    if result.pop("sha256", None) != digest(result):
        raise UsageError(f"{path} is not what was written there; make it again by {Path(__file__).name}")
    return result


def main(options: Options, config: Config | None = None) -> None:
    """Compares, and writes the numbers and the page."""
    if len(set(options.seeds)) < max(2, len(options.seeds)):
        raise UsageError(f"got --seeds {' '.join(map(str, options.seeds))}, expected two or more different ones")
    for module in ("torch", "diffusers"):
        import_extra(module, "parity", Path(__file__).name)
    result = as_json(compare(config or recipe(options.steps), options))
    write_text(epath.Path(options.result), json.dumps(result | {"sha256": digest(result)}, indent=1) + "\n")
    write_text(epath.Path(options.page), page(result))
    print(f"{options.result} and {options.page} are written.", flush=True)


def command() -> None:
    """The command line."""
    try:
        main(tyro.cli(Options, description=__doc__))
    except Interrupted as stop:
        print(f"{stop}; the same command continues.", file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None


if __name__ == "__main__":
    run_command(command)
