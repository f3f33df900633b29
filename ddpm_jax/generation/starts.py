"""What the reverse process starts from: noise, a noised picture, a mixture of two, or noise beside what a mask keeps."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddpm_jax.core.errors import UsageError
from ddpm_jax.diffusion.process import Process, q_sample
from ddpm_jax.generation.options import GivenOptions, SamplerOptions
from ddpm_jax.sampling import Sampler, choose_steps, draw_x_T, make_sampler, reverse
from ddpm_jax.sampling.inpainting import inpaint
from ddpm_jax.sampling.latents import start_row
from ddpm_jax.sampling.scan import Watched
from ddpm_jax.training.experiment import Experiment

# (model, key, indices, watch, the images' rows of the tables by name) -> x, and x after the rows of `watch`
Start = Callable[..., tuple[Array, Watched]]
CLIP = {"static": True, "none": False, "dynamic": 0.995}


def build_sampler(process: Process, options: SamplerOptions, *, highest: int | None = None) -> Sampler:
    """The sampler of these options. highest: the largest t that it visits. Raises UsageError if they do not go together."""
    if options.steps == ():
        raise UsageError("--steps has no value; give one, or leave it out for all steps")
    if options.spacing != SamplerOptions().spacing and not options.steps:
        raise UsageError(
            f"--spacing {options.spacing} has no effect without --steps, since all are visited; give both, or none"
        )
    try:
        return make_sampler(
            process,
            options.sampler,
            steps=options.steps or (),
            spacing=options.spacing,
            eta=options.eta,
            clip=CLIP[options.clip],
            highest=highest,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def make_start(experiment: Experiment, options: SamplerOptions, given: GivenOptions | None) -> Start:
    """The whole reverse process from x_T, or what the options say of the pictures given.

    Args:
        experiment: The experiment of the network.
        options: The sampler.
        given: What is done with pictures given; None: there are none.

    Returns:
        A `Start`.

    Raises:
        UsageError: For options that do not go together.
    """
    if given is not None and given.inpaint:
        return _beside_a_mask(experiment, options, given)
    if given is not None and (given.from_images or given.interpolate):
        return _from_noised(experiment, options, given.noise_level)
    sampler = build_sampler(experiment.process, options)

    def start(model, key, indices, watch):
        return reverse(sampler, model, key, indices, draw_x_T(key, indices, experiment.image_shape), watch=watch)

    return start


def _from_noised(experiment: Experiment, options: SamplerOptions, level: float) -> Start:
    """From q(x_t | x_0) of each picture, with draw k = 0 as its noise; or from a mixture (1 - f) x_t + f x_t' of two pictures.

    All images of an interpolation share the noise of image 0, and their x_t' that of image 1, so that they differ by f alone.
    """
    process, to_network = experiment.process, experiment.pixels.to_network
    sampler = build_sampler(process, options)
    t = max(round(level * process.schedule.T), 1) - 1
    try:
        rows = slice(start_row(sampler, t), None)
    except ValueError as error:
        raise UsageError(
            f"--noise-level {level:g} is below the sampler's steps ({error}); raise it, or --steps"
        ) from None
    if sampler.memory:  # it looks back, so it cannot start within a longer chain
        sampler, rows = build_sampler(process, options, highest=t), slice(None)
    t = int(np.asarray(sampler.rows["t"])[rows][0])

    def noised(key, indices, images):
        at, eps = jnp.full(indices.shape, t), draw_x_T(key, indices, experiment.image_shape)
        return q_sample(process.schedule, to_network(images), at, eps)

    def start(model, key, indices, watch, pictures=None, ends=None, fractions=None):
        if ends is None:
            x_t = noised(key, indices, pictures)
        else:
            indices, f = jnp.zeros_like(indices), fractions[:, None, None, None]
            x_t = (1 - f) * noised(key, indices, ends[:, 0]) + f * noised(key, indices + 1, ends[:, 1])
        return reverse(sampler, model, key, indices, x_t, rows=rows, watch=watch)

    return start


def _beside_a_mask(experiment: Experiment, options: SamplerOptions, given: GivenOptions) -> Start:
    """From x_T, by RePaint: what the masks keep is that of the pictures."""
    process = experiment.process
    build_sampler(process, options)  # which refuses options in its words
    steps = choose_steps(process.schedule, options.steps or (), options.spacing)
    if options.sampler != "ancestral":
        raise UsageError(f"--inpaint is of ancestral sampling, got --sampler {options.sampler}; leave it out")

    def sampler(known, masks):
        walk = {"jump": given.inpaint_jump, "times": given.inpaint_times}
        return inpaint(process, steps, known, masks, clip=CLIP[options.clip], **walk)

    try:
        sampler(jnp.zeros(()), jnp.zeros(()))  # refused before anything is compiled
    except ValueError as error:
        raise UsageError(f"--inpaint: {error}; change --inpaint-jump, --inpaint-times or --steps") from None

    def start(model, key, indices, watch, pictures, masks):
        known, x_T = experiment.pixels.to_network(pictures), draw_x_T(key, indices, experiment.image_shape)
        return reverse(sampler(known, masks), model, key, indices, x_T, watch=watch)

    return start
