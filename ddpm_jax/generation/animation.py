"""Animations of the reverse process: a grid of x_t from noise to images."""

import contextlib
import io

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from ddpm_jax.core import sharding
from ddpm_jax.core.files import sole_writer, write_bytes
from ddpm_jax.data.sheets import enlarge, grid, to_pil
from ddpm_jax.generation.generator import draw, make_generator, parameters, sample_key
from ddpm_jax.generation.image_set import tables_of
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.generation.set_mark import add_to_list, is_listed
from ddpm_jax.generation.starts import build_sampler
from ddpm_jax.training.workdir import Run

FRAMES, MILLISECONDS, LAST_MILLISECONDS = 50, 80, 2000


def write_animation(
    run: Run, path: epath.Path, indices: range, *, seed: int, options: SamplerOptions, batch_size: int
) -> None:
    """Writes x_t of the first images of a set, at up to 50 equally spaced steps, as a looping .gif or .webp.

    The path's ending selects the format. The first min(64, batch_size) images are shown, and the last frame stays for two
    seconds. set.json beside the file lists it; a file that matches its listing is not written again.
    """
    with contextlib.ExitStack() as held:

        def look() -> bool:
            held.enter_context(sole_writer(path.parent))
            return is_listed(path)

        if sharding.first_decides(look):
            return
        x_t = _seen(run, indices, seed=seed, options=options, count=min(64, batch_size, len(indices)))
        if jax.process_index() != 0:
            return
        frames = [to_pil(enlarge(grid(images))) for images in x_t]
        durations = [MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
        film = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0, "lossless": True}
        content = io.BytesIO()
        frames[0].save(content, path.suffix[1:], **film)
        write_bytes(path, content.getvalue())
        add_to_list(path)


def _seen(
    run: Run, indices: range, *, seed: int, options: SamplerOptions, count: int
) -> UInt8[np.ndarray, "F n H W C"]:
    """x_t of the first `count` images at the steps of the frames."""
    rows = len(build_sampler(run.experiment.process, options))
    watch = np.unique(np.linspace(0, rows - 1, min(FRAMES, rows)).round().astype(int)).tolist()
    generate = make_generator(run.experiment, run.mesh, options, watch=watch, guide=run.guide, given=run.given)
    tables, size = tables_of(run, options), sharding.round_up(count, run.mesh.devices.size)
    _, x_t = draw(generate, parameters(run), sample_key(seed), indices, size=size, given=tables)
    return run.experiment.pixels.to_pictures(np.asarray(x_t)[:, :count])
