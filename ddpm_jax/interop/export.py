"""Exports a run to one file for programs without this package: its parameters, or its whole sampler, by the file's ending.

NAME.safetensors   the parameters by path, `down_1_attn_0/q/kernel`; config, step, weights and classes in the metadata
NAME.jax_export    (seed, indices) -> images as StableHLO, parameters included, for cpu, cuda and tpu
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export
from jaxtyping import Array, Int, Shaped, UInt32
from safetensors.numpy import save

from ddpm_jax.config import to_json
from ddpm_jax.core import rng
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import check_place, write_bytes
from ddpm_jax.core.rng import Purpose
from ddpm_jax.sampling import sample
from ddpm_jax.training.parameters import flatten
from ddpm_jax.training.workdir import Run

PLATFORMS = ("cpu", "cuda", "tpu")


def parameters_file(run: Run) -> bytes:
    """The parameters, float32, as safetensors, with the metadata `config` (JSON), `step` and `weights`.

    The metadata of a run whose classes have names also has `classes`, a JSON list of these.
    """
    metadata = {"config": json.dumps(to_json(run.config)), "step": str(run.step), "weights": run.weights}
    if run.classes:
        metadata["classes"] = json.dumps(run.classes)
    return save({path: np.asarray(array) for path, array in flatten(run.params).items()}, metadata)


def sampler_file(run: Run) -> bytes:
    """The sampler as a program of `jax.export`: (uint32 seed, int32 (B,) indices) -> images (B, H, W, C), for any B.

    Images are uint8, or float32 with data.value_range. Of a run with classes the program takes a further argument, the labels,
    int32 (B,), and then of one with conditions these, (B, h, w, K) as they are stored: a smaller or a grey picture, say.

    It gives the images of `sample.py` with the same seed: ancestral sampling with all steps. To run it:

        program = jax.export.deserialize(bytearray(open("NAME.jax_export", "rb").read()))
        images = program.call(jax.numpy.uint32(0), jax.numpy.arange(16, dtype="int32"))
    """
    params = jax.tree.map(np.asarray, run.params)

    classes, conditioning = run.experiment.num_classes, run.experiment.conditioning

    def program(seed: UInt32[Array, ""], indices: Int[Array, " B"], *given: Array) -> Shaped[Array, "B H W C"]:
        labels = given[0] if classes else None
        condition = conditioning.to_network(given[-1]) if conditioning else None
        # The parameters are constants of the program; the barrier prevents constant folding.
        held = jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, params))
        images = sample(
            run.experiment.process,
            run.experiment.model(held, labels=labels, condition=condition),
            rng.stream(jax.random.key(seed, impl="threefry2x32"), Purpose.SAMPLE),
            indices,
            image_shape=run.experiment.image_shape,
        )
        return run.experiment.pixels.from_network(images)

    (B,) = export.symbolic_shape("B")
    each = jax.ShapeDtypeStruct((B,), jnp.int32)
    shapes = [jax.ShapeDtypeStruct((), jnp.uint32), each] + ([each] if classes else [])
    if conditioning:
        shapes.append(jax.ShapeDtypeStruct((B, *conditioning.shape), run.experiment.pixels.dtype))
    return bytes(export.export(jax.jit(program), platforms=PLATFORMS)(*shapes).serialize())


def check_file(file: epath.PathLike) -> None:
    """Raises UsageError if the file has another ending, exists, or cannot be written."""
    file = epath.Path(file)
    if file.suffix not in (".safetensors", ".jax_export"):
        raise UsageError(
            f"got the file {file}, expected one that ends in .safetensors (parameters) or .jax_export (sampler)"
        )
    check_place(file, "give another file")
    if file.exists():
        raise UsageError(f"{file} exists; choose another name, or move it away")


def export_run(run: Run, file: epath.PathLike) -> None:
    """Writes the run atomically to a file; its ending selects the format. Raises as `check_file`."""
    check_file(file)
    file = epath.Path(file)
    content = parameters_file(run) if file.suffix == ".safetensors" else sampler_file(run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, content)
