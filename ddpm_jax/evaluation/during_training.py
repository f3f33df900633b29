"""What a run measures of itself while it trains: losses and bits/dim of held-out images, and the FID of a few samples.

Always of the EMA parameters, and with the same draws each time, so that two evaluations differ by the parameters alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ddpm_jax import rng, sharding
from ddpm_jax.config import Config
from ddpm_jax.data import Source, open_source
from ddpm_jax.errors import UsageError
from ddpm_jax.evaluation import scores
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.inception_weights import inception_features
from ddpm_jax.evaluation.likelihood import Drawn, bound_key, draw_times, make_bound, mean_and_error, strata
from ddpm_jax.evaluation.parts import digest
from ddpm_jax.evaluation.run import Options, feature_statistics, real_features
from ddpm_jax.generate import Generator, batch_ranges, generate_batches, sample_key
from ddpm_jax.training import build_schedule, build_unet, image_losses

QUARTERS = 4
TERMS = 16  # of the bound between L_T and L_0, for each image

Measure = Callable[[Any], dict[str, Any]]


def open_held_out(config: Config) -> Source:
    """The images of train.eval_source, made as the training images are. Raises UsageError if they, or two, cannot be had."""
    source = open_source(dataclasses.replace(config.data, source=config.train.eval_source))
    if len(source) < 2:
        raise UsageError(f"train.eval_source={config.train.eval_source} has {len(source)} image; give at least 2")
    return source


def spread(source: Source, count: int) -> np.ndarray:
    """At most `count` images of a source, uint8 (n, H, W, C), at equal distances: a source may be sorted by class."""
    count = min(count, len(source))
    return source.read(np.arange(count) * len(source) // count)


def eval_of(config: Config, source: Source, held_out: Source) -> str:
    """A text that is equal for evaluations of the same images, samples and features: their numbers can be compared."""
    options = config.train
    of_samples = [source.identity, options.eval_samples, options.eval_features] if options.eval_samples else []
    return digest([held_out.identity, min(options.eval_images, len(held_out)), *of_samples])[:8]


def make_quarter_losses(config: Config, mesh: Mesh) -> Callable[..., Float[Array, "B 4"]]:
    """Compiles (params, key, uint8 images (B, H, W, C), indices (B,)) -> the config's loss of each image in each quarter.

    Each image is given one t of each quarter of 0 .. T-1, and noise, by (key, its index) alone; no dropout, no flips.
    """
    schedule, unet = build_schedule(config), build_unet(config)
    loss_of_images = image_losses(config)
    edges = np.arange(QUARTERS + 1) * schedule.T // QUARTERS

    def quarter_losses(params, key, images, indices):
        def model(x_t, t):
            return unet.apply({"params": params}, x_t, t)

        images, indices = jax.lax.with_sharding_constraint((images, indices), sharding.split(mesh))
        x_0, keys = images.astype(jnp.float32) / 127.5 - 1.0, rng.image_keys(key, indices)

        def body(carry, t):
            return carry, loss_of_images(model, x_0, t, rng.image_normal(keys, t, x_0.shape[1:]))

        _, losses = jax.lax.scan(body, None, draw_times(key, indices, edges, schedule.T)[:, 1:].T)
        return losses.T

    return jax.jit(quarter_losses, out_shardings=sharding.replicated(mesh))


def make_fid(config: Config, mesh: Mesh, source: Source, generator: Generator) -> Callable[[Any], float]:
    """Parameters -> the FID between the first train.eval_samples images of the run's seed and all of the source's."""
    options, devices = config.train, mesh.devices.size
    size = options.num_samples  # as the grids: the generator compiles one program for each size
    part = -(-Options().batch_size // devices) * devices  # as evaluate.py, which finds the same features
    features = PIXELS
    if options.eval_features == "inception":
        features = inception_features(mesh, preprocessing="tensorflow", batch_size=part)
    real = real_features(source, features, batch_size=part, mesh=mesh)
    reference = feature_statistics(real, count=len(source), batch_size=part)
    ranges = batch_ranges(range(options.eval_samples), batch_size=size, num_devices=devices)

    def fid(params):
        batches = generate_batches(
            generator, params, sample_key(config.seed), ranges, batch_size=size, num_devices=devices
        )
        drawn = np.concatenate([features.compute(images)["features"] for _, images in batches])
        return scores.frechet_distance(scores.statistics(drawn), reference)

    return fid


def make_evaluation(config: Config, mesh: Mesh, source: Source, held_out: Source, generator: Generator) -> Measure:
    """EMA parameters -> the numbers that train.eval_every asks for, by name.

    eval_loss and eval_loss_quarter_1 .. 4 (from small t to large): the training loss of train.eval_images held-out images;
    eval_bits_per_dim and its standard error over them: an unbiased estimate of the bound from 16 terms between L_T and L_0;
    eval_fid, if train.eval_samples: between so many samples and the training images (source).

    eval_of: what these numbers are of, by the function of that name.

    generator: what the run's grids are drawn with. Raises UsageError if the Inception weights are needed and not there.
    """
    options, T = config.train, config.diffusion.T
    images, key, size = spread(held_out, options.eval_images), bound_key(config.seed), options.batch_size
    edges = strata(T, min(TERMS, T - 1))
    quarter_losses, bound = make_quarter_losses(config, mesh), make_bound(config, mesh, edges)
    fid = make_fid(config, mesh, source, generator) if options.eval_samples else None

    def of_all(compute, params):
        parts = []
        for first in range(0, len(images), size):
            indices = np.arange(first, first + size, dtype=np.int32)
            parts.append(compute(params, key, images[indices % len(images)], indices))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays).astype(np.float64)[: len(images)], *parts)

    def measure(params):
        losses = of_all(quarter_losses, params).mean(axis=0)
        drawn = Drawn(**of_all(bound, params))
        bits = mean_and_error(drawn.L_T + drawn.bits @ np.array([1, *np.diff(edges)]))
        values = {"eval_loss": losses.mean()}
        values |= {f"eval_loss_quarter_{i}": loss for i, loss in enumerate(losses, 1)}
        values |= {"eval_bits_per_dim": bits["value"], "eval_bits_per_dim_error": bits["standard_error"]}
        if fid:
            values["eval_fid"] = fid(params)
        return {name: float(value) for name, value in values.items()} | {"eval_of": eval_of(config, source, held_out)}

    return measure
