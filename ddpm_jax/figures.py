"""The paper's figures, of a run: pictures as grids of images, curves by matplotlib.

samples          a grid of samples                                              (Figures 1, 11-14)
progressive      the x_0 predicted along the reverse process                    (Figure 6)
shared_latents   samples that share x_t with the first one, for several t       (Figure 7)
interpolation    between two real images, mixed at several t                    (Figure 8)
nearest          samples and the real images nearest to them                    (Figure 15)
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ddpm_jax import rng
from ddpm_jax.config import Config
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.files import whole
from ddpm_jax.generate import sample_key, to_uint8
from ddpm_jax.reporting import enlarge, grid, png_bytes
from ddpm_jax.sampling.ancestral import ancestral
from ddpm_jax.training import build_process, build_schedule, build_unet

if TYPE_CHECKING:
    from ddpm_jax.evaluation.run import Evaluation

COLUMNS = 8
FOLDER = "figures"


def make_chain(config: Config) -> Callable[..., tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]]:
    """Compiles (params, key, indices, x, first, last) -> (x, x_0): steps first .. last-1 of Algorithm 2, counted from x_T.

    The noise is that of `sample`, so that steps 0 .. T-1 from its x_T give its images; x_0 is the last step's prediction.
    first and last may be traced, unlike the parts of `sampling.reverse`: one program, compiled once, draws all figures.
    """
    process, unet = build_process(config), build_unet(config)
    sampler = ancestral(process, np.arange(process.schedule.T))

    def chain(params, key, indices, x, first, last):
        keys = rng.image_keys(key, indices)

        def model(x_t, t):
            return unet.apply({"params": params}, x_t, t)

        def step(k, x_and_x_0):
            x, _ = x_and_x_0
            row = jax.tree.map(lambda table: jnp.asarray(table, jnp.int32)[k], sampler.rows)
            return sampler.step(model, x, row, lambda: rng.image_normal(keys, k + 1, x.shape[1:]), ())

        return jax.lax.fori_loop(first, last, step, (x, x))

    return jax.jit(chain)


class Chains:
    """Reverse processes of a run's first images, for the figures that look into them."""

    def __init__(self, config: Config, params: Any, *, seed: int, count: int = COLUMNS):
        self.schedule = build_schedule(config)
        self.count = count
        self.shape = (config.data.image_size, config.data.image_size, config.data.channels)
        self.key = sample_key(seed)
        self._run = make_chain(config)
        self._params = params

    def start(self, indices: Sequence[int]) -> Float[Array, "B H W C"]:
        """x_T of the given images."""
        return rng.image_normal(rng.image_keys(self.key, jnp.asarray(indices)), 0, self.shape)

    def steps(self, indices: Sequence[int], x: Array, first: int, last: int) -> tuple[Array, Array]:
        """x after some steps of the reverse process, and the x_0 predicted in the last of them."""
        return self._run(self._params, self.key, jnp.asarray(indices), x, first, last)

    def progressive(self, *, frames: int = 10) -> UInt8[np.ndarray, "N H W C"]:
        """The x_0 predicted at equal distances along the process, a row of min(frames, T) for each of the first images."""
        T, x, columns = self.schedule.T, self.start(range(self.count)), []
        stops = sorted({max(1, round(T * i / frames)) for i in range(1, frames + 1)})
        for first, last in zip([0, *stops[:-1]], stops, strict=True):
            x, x_0 = self.steps(range(self.count), x, first, last)
            columns.append(to_uint8(x_0))
        return np.stack(columns, axis=1).reshape(-1, *self.shape)

    def shared_latents(self) -> UInt8[np.ndarray, "N H W C"]:
        """Samples from one x_t, a row for each of t = T, 3T/4, T/2, T/4: what x_t decides, and what is left open."""
        T, rows = self.schedule.T, []
        for first in (0, T // 4, T // 2, 3 * T // 4):
            x, _ = self.steps([0], self.start([0]), 0, first)
            x, _ = self.steps(range(self.count), jnp.repeat(x, self.count, axis=0), first, T)
            rows.append(to_uint8(x))
        return np.concatenate(rows)

    def interpolation(self, real: UInt8[np.ndarray, "2 H W C"]) -> UInt8[np.ndarray, "N H W C"]:
        """Between two real images: both noised to x_t, mixed, and taken back, a row for each of t = T/8, T/4, T/2, 3T/4, T.

        First and last in each row are the images themselves; the noise is the same for every mixture.
        """
        T, x_0 = self.schedule.T, real.astype(np.float32) / 127.5 - 1.0
        rows: list[Any] = []
        for noised in (T // 8, T // 4, T // 2, 3 * T // 4, T):
            t = jnp.full(2, max(noised, 1) - 1, jnp.int32)
            a, b = q_sample(self.schedule, jnp.asarray(x_0), t, self.start([0, 1]))
            mixed = jnp.stack([(1 - part) * a + part * b for part in np.linspace(0, 1, self.count - 2)])
            x, _ = self.steps([0] * len(mixed), mixed, T - max(noised, 1), T)
            rows += [real[:1], to_uint8(x), real[1:]]
        return np.concatenate(rows)


def nearest_grid(
    samples: UInt8[np.ndarray, "n H W C"], real: Callable[[np.ndarray], np.ndarray], places: list[list[int]]
) -> UInt8[np.ndarray, "N H W C"]:
    """A row for each sample: itself, then the real images nearest to it."""
    images: list[np.ndarray] = []
    for sample, near in zip(samples, places, strict=False):
        images += [sample[None], real(np.asarray(near))]
    return np.concatenate(images)


def draw_figures(evaluation: "Evaluation", results: dict[str, dict[str, Any]]) -> None:
    """Draws the figures of pictures into WORKDIR/evaluation/figures, each as a PNG named by the step.

    results: of the metrics computed now; the nearest real images are those of `nearest` among them. Of several processes all
    compute, and the first one writes.
    """
    run, folder, samples = evaluation.run, evaluation.folder / FOLDER, evaluation.first_samples
    chains = Chains(run.config, run.params, seed=evaluation.options.seed)
    pictures = {
        "samples": grid(samples),
        "progressive": grid(chains.progressive(frames=10), columns=min(10, chains.schedule.T)),
        "shared_latents": grid(chains.shared_latents(), columns=COLUMNS),
    }
    if evaluation.num_real >= 2:
        pictures["interpolation"] = grid(chains.interpolation(evaluation.read(range(2))), columns=COLUMNS)
    for name, found in results.get("nearest", {}).get("nearest", {}).items():
        near = nearest_grid(samples, evaluation.source.read, found["places"])
        columns = 1 + len(found["places"][0])
        pictures["nearest" if name == "pixels" else "nearest_features"] = grid(near, columns=columns)
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, sheet in pictures.items():
        with whole(folder / f"{name}-{run.step:08d}.png") as temporary:
            temporary.write_bytes(png_bytes(enlarge(sheet)))


# ---- Curves


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    marks: bool = False,
    log: bool = False,
) -> bytes:
    """Lines by name, (x, y) each, as an SVG picture's content."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=name, marker="o" if marks else None, linewidth=1.5)
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize="x-small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
