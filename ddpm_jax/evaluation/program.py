"""Features by a program that `jax.export` wrote: any network that maps images to vectors, in one file.

The program takes uint8 images (B, H, W, C) of any number B, and gives {"features": (B, D)}, and "logits" (B, K) if it
classifies. The SHA-256 of the file is part of the features' name, so that results and caches tell programs apart.
"""

import hashlib

import jax
import jax.numpy as jnp
from etils import epath
from jax import export
from jax.sharding import Mesh

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, first_line
from ddpm_jax.evaluation.features import Features, on_devices

EXPECTED = 'a program of jax.export: uint8 images (B, H, W, C), B any number, to {"features": (B, D)}'


def program_features(
    path: epath.PathLike, mesh: Mesh, *, image_shape: tuple[int, int, int], batch_size: int
) -> Features:
    """The feature function of an exported program.

    Args:
        path: The file.
        mesh: The devices that a batch is split over.
        image_shape: (H, W, C) of the images that it is for.
        batch_size: Images computed together.

    Raises:
        UsageError: If there is no such file, or it is no such program, or one for images of another shape.
    """
    path = epath.Path(path)
    content = sharding.first_reads(path)
    if content is None:
        raise UsageError(f"--features {path} does not exist; give inception, pixels or {EXPECTED}")
    name = f"{path.name}, sha256 {hashlib.sha256(content).hexdigest()[:16]}"
    try:
        program = export.deserialize(bytearray(content))
    except Exception as error:  # a damaged file raises almost anything
        raise UsageError(f"--features {path} cannot be read ({first_line(error)}); give {EXPECTED}") from None
    try:
        found = jax.eval_shape(program.call, jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8))
    except Exception as error:  # of jax.export, for arguments of another shape or type
        raise UsageError(
            f"--features {path} does not take uint8 images {image_shape} ({first_line(error)}); give {EXPECTED}"
        ) from None
    names = set(found) if isinstance(found, dict) else set()
    if "features" not in names or names - {"features", "logits"} or any(a.shape[:1] != (2,) for a in found.values()):
        raise UsageError(f"--features {path} does not give features; give {EXPECTED}")
    if any(a.ndim != 2 for a in found.values()):
        raise UsageError(f"--features {path} gives {found['features'].shape[1:]} for an image; give {EXPECTED}")
    return Features(name, on_devices(lambda _, images: program.call(images), (), mesh, batch_size))
