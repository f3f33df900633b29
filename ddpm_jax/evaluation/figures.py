"""The paper's figures for a run: grids of images, and curves by matplotlib.

samples          a grid of samples                                              (Figures 1, 11-14)
progressive      the x_0 predicted along the reverse process                    (Figure 6)
shared_latents   samples that share x_t with the first one, for several t       (Figure 7)
interpolation    between two real images, at several t                          (Figure 8)
nearest          samples and the real images nearest to them                    (Figure 15)
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Shaped, UInt8

from ddpm_jax.core.files import write_bytes
from ddpm_jax.data.pixels import to_uint8
from ddpm_jax.data.sheets import enlarge, grid, png_bytes
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.evaluation.evaluation import Evaluation
from ddpm_jax.evaluation.results import sampled_by
from ddpm_jax.generation.generator import sample_key
from ddpm_jax.sampling import latents
from ddpm_jax.sampling.ancestral import ancestral
from ddpm_jax.sampling.latents import Chain
from ddpm_jax.sampling.scan import advance
from ddpm_jax.training.weights import file_part
from ddpm_jax.training.workdir import Run

COLUMNS = 8
FOLDER = "figures"
SAMPLED = ("samples", "nearest", "nearest_features")  # of the evaluation's samples, by its sampler


def chain_of(run: Run, *, seed: int, rows: np.ndarray | None = None) -> Chain:
    """The run's ancestral chain, compiled once for all figures.

    Of a run with classes it is of no class, or, where the network does not know that, of the first. Of one with conditions it is
    of the condition of the first of a source's rows.
    """
    experiment, key = run.experiment, sample_key(seed)
    sampler = ancestral(experiment.process, np.arange(experiment.process.schedule.T))

    labels = 0 if experiment.num_classes and not experiment.config.train.label_dropout else None

    condition = None if experiment.conditioning is None else experiment.split(rows)[1]

    def steps(params, indices, x, first, last):
        return advance(
            sampler, experiment.model(params, labels=labels, condition=condition), key, indices, x, first, last
        )

    return Chain(sampler, key, experiment.image_shape, functools.partial(jax.jit(steps), run.params))


def progressive(chain: Chain, *, frames: int = 10) -> UInt8[np.ndarray, "N H W C"]:
    """The x_0 predicted along the reverse process, a row of `frames` for each image."""
    seen = latents.progressive_generation(chain, jnp.arange(COLUMNS), count=frames)
    return np.asarray(to_uint8(seen.x_0)).swapaxes(0, 1).reshape(-1, *chain.image_shape)


def shared(chain: Chain) -> UInt8[np.ndarray, "N H W C"]:
    """Samples that share one x_t, a row for each of t = T, 3T/4, T/2, T/4."""
    T = len(chain.sampler)
    rows = [latents.shared_latents(chain, 0, t=T - 1 - T * i // 4, count=COLUMNS) for i in range(4)]
    return np.asarray(to_uint8(jnp.concatenate(rows)))


def interpolation(chain: Chain, schedule: Schedule, real: Float[Array, "2 H W C"]) -> UInt8[np.ndarray, "N H W C"]:
    """Interpolations between two real images in x_t, a row for each of t = T/8, T/4, T/2, 3T/4, T. real: in [-1, 1].

    Each row starts and ends with the images themselves. All interpolations share the same noise.
    """
    T, (one, other), ends = schedule.T, real[:, None], np.asarray(to_uint8(real))
    fractions, rows = np.linspace(0, 1, COLUMNS - 2).tolist(), []
    for noised in (T // 8, T // 4, T // 2, 3 * T // 4, T):
        t = max(noised, 1) - 1
        mixed = latents.interpolate(chain, schedule, jnp.arange(1), one, other, t=t, fractions=fractions)
        rows += [ends[:1], np.asarray(to_uint8(mixed[:, 0])), ends[1:]]
    return np.concatenate(rows)


def nearest_grid(
    samples: Shaped[np.ndarray, "n H W C"], real: Callable[[np.ndarray], np.ndarray], places: list[list[int]]
) -> Shaped[np.ndarray, "N H W C"]:
    """A row for each sample: the sample, then its nearest real images."""
    pairs = zip(samples, places, strict=False)
    return np.concatenate([part for sample, near in pairs for part in (sample[None], real(np.asarray(near)))])


def _sheet(samples: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "h w c"]:
    return grid(samples, columns=min(COLUMNS, len(samples)))


def draw_samples(run: Run, evaluation: Evaluation, folder: epath.Path) -> None:
    """Draws the first samples alone, the picture that a report starts with, as `draw_figures` does."""
    sheet = _sheet(run.experiment.pixels.to_pictures(evaluation.first_samples()))
    _write(run, folder, {"samples": sheet}, sampled_by(evaluation.sampling()))


def draw_figures(run: Run, evaluation: Evaluation, folder: epath.Path, results: dict[str, dict[str, Any]]) -> None:
    """Draws the figures into a folder, each as a PNG named by the step, and by "raw" for raw parameters.

    All processes compute; process 0 writes.

    results: of the metrics; its `nearest` gives the nearest real images.
    """
    samples, pixels = evaluation.first_samples(), run.experiment.pixels
    chain = chain_of(run, seed=evaluation.options.seed, rows=evaluation.source.read_rows(np.arange(1)))
    schedule = run.experiment.process.schedule
    pictures = {
        "samples": _sheet(pixels.to_pictures(samples)),
        "progressive": grid(progressive(chain), columns=min(10, schedule.T)),
        "shared_latents": grid(shared(chain), columns=COLUMNS),
    }
    classless = not run.experiment.num_classes or run.config.train.label_dropout > 0
    if evaluation.num_real >= 2 and classless and run.experiment.conditioning is None:  # whose would they be?
        real = pixels.to_network(evaluation.read(range(2)))
        pictures["interpolation"] = grid(interpolation(chain, schedule, real), columns=COLUMNS)
    for name, found in results.get("nearest", {}).get("nearest", {}).items():
        near = nearest_grid(samples, evaluation.source.read, found["places"])
        columns = 1 + len(found["places"][0])
        pictures["nearest" if name == "pixels" else "nearest_features"] = grid(
            pixels.to_pictures(near), columns=columns
        )
    _write(run, folder, pictures, sampled_by(evaluation.sampling()))


def _write(run: Run, folder: epath.Path, pictures: dict[str, UInt8[np.ndarray, "h w c"]], drawn: str) -> None:
    """Writes pictures. drawn: how the evaluation's samples were drawn."""
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    end = "" if run.weights == "ema" else f"-{file_part(run.weights)}"
    for name, sheet in pictures.items():
        content = png_bytes(enlarge(sheet), drawn if name in SAMPLED else "")
        write_bytes(folder / f"{name}-{run.step:08d}{end}.png", content)


# ---- Curves

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind, and in grey
STEPS = (1, 2, 5, 10)  # between ticks
DECADE = 10  # a logarithmic axis over less than this ratio gets equal steps, as there are few round numbers inside


def _tick(value: float, place: float) -> str:
    """A tick's label without an exponent."""
    return np.format_float_positional(value, precision=10, trim="-") if abs(value) < 1 else f"{value:,.10g}"


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    marks: bool = False,
    log: bool = False,
    dashed: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    band: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None,
) -> bytes:
    """Plots lines, (x, y) by name, as the content of an SVG file without a background.

    log: the y axis, if all y are positive. dashed: more lines, beside those of the same names in their colours. band: (x, low,
    high), shaded.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3), layout="constrained")  # in inches of a page, so that a phone can show the texts
    axes = figure.subplots()
    axes.set_prop_cycle(color=COLORS)
    for name, (xs, ys) in lines.items():
        (line,) = axes.plot(xs, ys, label=name, marker="o" if marks or len(xs) == 1 else None, linewidth=1.8)
        if dashed and name in dashed:
            axes.plot(*dashed[name], color=line.get_color(), linestyle="--", linewidth=1.2)
    if band is not None:
        axes.fill_between(*band, color=COLORS[0], alpha=0.2, linewidth=0)
    finite = [value for _, ys in lines.values() for value in ys if np.isfinite(value)]
    log = log and bool(finite) and min(finite) > 0
    whole_numbers = all(float(value).is_integer() for xs, _ in lines.values() for value in xs)
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    if log and max(finite) > DECADE * min(finite):
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=STEPS[:-1] if max(finite) < 1000 * min(finite) else (1,)))
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=STEPS))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=STEPS, integer=whole_numbers))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_tick)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        figure.legend(loc="outside upper left", fontsize="small", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()
