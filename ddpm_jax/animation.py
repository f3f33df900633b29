"""The reverse process as a moving picture: a grid of x_t on its way from noise to images."""

import io

import jax
import numpy as np
from etils import epath

from ddpm_jax import sharding
from ddpm_jax.files import whole
from ddpm_jax.generate import SamplerOptions, build_sampler, make_generator, sample_key
from ddpm_jax.reporting import enlarge, grid, to_pil
from ddpm_jax.workdir import Run

FRAMES, MILLISECONDS, LAST_MILLISECONDS = 50, 80, 2000


def write_animation(
    run: Run, path: epath.Path, indices: range, *, seed: int, options: SamplerOptions, batch_size: int
) -> None:
    """Writes x_t of the first of the images, at up to 50 equally spaced steps, as a looping .gif or .webp (the path's ending).

    They are the first 64, or batch_size where that is less, and those that the same seed and options give alone; the last
    frame stays for two seconds. A file that is there is left as it is.
    """
    if sharding.first_decides(path.exists):
        return
    rows = len(build_sampler(run.config, options))
    watch = np.unique(np.linspace(0, rows - 1, min(FRAMES, rows)).round().astype(int)).tolist()
    count = min(64, batch_size, len(indices))
    padded = -(-count // run.mesh.devices.size) * run.mesh.devices.size
    places = np.arange(indices.start, indices.start + padded, dtype=np.int32)
    _, x_t = make_generator(run.config, run.mesh, options, watch=watch)(run.params, sample_key(seed), places)
    if jax.process_index() != 0:
        return
    frames = [to_pil(enlarge(grid(images[:count]))) for images in np.asarray(x_t)]
    durations = [MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    content = io.BytesIO()
    frames[0].save(
        content, path.suffix[1:], save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True
    )
    with whole(path) as temporary:
        temporary.write_bytes(content.getvalue())
