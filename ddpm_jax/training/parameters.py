"""Parameters by their paths, `down_1_attn_0/q/kernel`, and the .safetensors files that hold them with their config.

`interop/export.py` writes such a file of a run, and `load_run` takes it in a workdir's place.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load

from ddpm_jax.config import Config, from_json
from ddpm_jax.core.errors import UsageError, first_line
from ddpm_jax.core.files import DamagedFileError, read_bytes

ENDING = ".safetensors"
MOST_BYTES = 2**34


class Stored(NamedTuple):
    """The content of a file: the config, the step, which parameters (see `weights`), the arrays by path, the classes' names."""

    config: Config
    step: int
    weights: str
    arrays: dict[str, np.ndarray]
    classes: tuple[str, ...]


def flatten(params: Any) -> dict[str, Any]:
    """A tree of parameters as {"down_1_attn_0/q/kernel": array}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(params: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(params), sep="/")


def read_content(path: epath.Path) -> bytes:
    """The bytes of a file of parameters. Raises UsageError if there is none."""
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a {ENDING} file that ddpm-jax convert export made")
    return read_bytes(path, most=MOST_BYTES)


def parse_arrays(path: epath.Path, content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a .safetensors file. Raises DamagedFileError for a content that is none."""
    try:
        length = int.from_bytes(content[:8], "little")
        return load(content), json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # other libraries' types are a KeyError
        raise DamagedFileError(path, f"it is not a whole {ENDING} file: {first_line(error)}") from None


def parse_parameters(path: epath.Path, content: bytes) -> Stored:
    """The parameters in a file's content, and what they are of.

    Raises UsageError for a file without our metadata, and DamagedFileError for one that is not safetensors.
    """
    arrays, metadata = parse_arrays(path, content)
    try:
        config, step, weights = (metadata[name] for name in ("config", "step", "weights"))
        classes = tuple(map(str, json.loads(metadata.get("classes", "[]"))))
        return Stored(from_json(json.loads(config)), int(step), weights, arrays, classes)
    except (KeyError, TypeError, ValueError) as error:  # a ConfigError is a ValueError
        raise UsageError(
            f"{path} has no config, step and weights of ours ({first_line(error)}); give a file that ddpm-jax convert export "
            "made"
        ) from None


def check_fit(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raises UsageError, naming the first differences, unless tensors have exactly the expected names and shapes.

    where: their file, for the message.
    """
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not of this network" for name in found if name not in expected]
    wrong += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more differ" if len(wrong) > 3 else ""
        raise UsageError(
            f"{where} does not fit the network of its config: {', '.join(wrong[:3])}{more}; use the config that it was "
            "trained with, or a whole copy of the file"
        )


def arrays_digest(about: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays by name, and of the JSON that belongs to them."""
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        sha.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return sha.hexdigest()
