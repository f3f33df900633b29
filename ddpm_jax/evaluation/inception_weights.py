"""The weights of Inception-v3, converted once from the file of pytorch-fid or torch-fidelity into the cache.

Each batch normalisation is folded into its convolution.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, first_line, import_extra
from ddpm_jax.core.files import whole
from ddpm_jax.data.cache import cache_folder
from ddpm_jax.evaluation.features import Features, on_devices
from ddpm_jax.evaluation.inception import SIZE, InceptionV3, Preprocessing, preprocess

INCEPTION = "inception-2015-12-05"  # the start of the features' name
SOURCE = "pt_inception-2015-12-05-6726825d.pth"
SOURCE_SHA256 = "6726825d"  # its first digits, as in the file's name
BN_EPSILON = 1e-3
HOW_TO_GET = (
    f"download {SOURCE} from the releases of pytorch-fid (or torch-fidelity's file of that date) and convert it with "
    "`ddpm-jax convert inception PATH`"
)


def inception_path() -> epath.Path:
    """The path of the converted weights."""
    return epath.Path(cache_folder()) / f"{INCEPTION}.safetensors"


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].shape}".encode())
        sha.update(np.ascontiguousarray(tensors[name], np.float32).tobytes())
    return sha.hexdigest()


def _shapes() -> dict[str, tuple[int, ...]]:
    empty = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), empty)["params"]
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep=".").items()}


def fold(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts PyTorch's state: OIHW kernels to HWIO, batch normalisation folded in, no last bias.

    Raises UsageError if a tensor is missing or has another shape.
    """
    folded = {}
    for name, shape in _shapes().items():
        module, leaf = name.rsplit(".", 1)
        try:
            if module == "fc":
                value = state["fc.weight"].T
            else:
                bn = module.removesuffix("conv") + "bn"
                scale = state[f"{bn}.weight"] / np.sqrt(state[f"{bn}.running_var"].astype(np.float64) + BN_EPSILON)
                if leaf == "kernel":
                    value = state[f"{module}.weight"].transpose(2, 3, 1, 0) * scale
                else:
                    value = state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * scale
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"the Inception weights lack or misshape what {name} is made of ({error}); {HOW_TO_GET}"
            ) from None
        if value.shape != shape:
            raise UsageError(
                f"the Inception weights give {name} the shape {value.shape}, expected {shape}; {HOW_TO_GET}"
            )
        folded[name] = np.ascontiguousarray(value, np.float32)
    return folded


def convert_inception(
    path: epath.PathLike, out: epath.PathLike | None = None, *, sha256: str = SOURCE_SHA256
) -> epath.Path:
    """Converts the public PyTorch weights into a safetensors file, by default in the cache, and returns its path.

    sha256: the required start of the file's SHA-256. Executes no code of the file. Raises UsageError for any other file.
    """
    from safetensors.numpy import save

    torch = import_extra("torch", "torch", str(path))
    path, out = Path(path), inception_path() if out is None else epath.Path(out)
    if not path.is_file():
        raise UsageError(f"{path} is not a file; {HOW_TO_GET}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(sha256):
        raise UsageError(f"the SHA-256 of {path} is {found[:16]}..., expected it to start with {sha256}; {HOW_TO_GET}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = fold({name: np.asarray(tensor) for name, tensor in state.items()})
    except UsageError:
        raise
    except Exception as error:  # a damaged file can raise any error
        raise UsageError(f"{path} cannot be read as PyTorch weights ({first_line(error)}); {HOW_TO_GET}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as temporary:
        temporary.write_bytes(save(tensors, {"source_sha256": found, "sha256": _checksum(tensors)}))
    return out


def load_inception(path: epath.PathLike | None = None) -> tuple[Any, str]:
    """Reads the network's parameters and their checksum on process 0, and broadcasts them.

    Raises UsageError if they are missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = inception_path() if path is None else epath.Path(path)
    content = sharding.first_reads(path)
    if content is None:
        raise UsageError(
            f"the Inception weights are not there ({path}); {HOW_TO_GET}; without them nll, rate-distortion and nearest "
            "work, and fid, kid and prdc of pixels (--features pixels, in training train.eval_features=pixels) or of a function "
            "of your own"
        )
    try:
        tensors = load(content)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:  # the latter three: types that NumPy lacks
        raise UsageError(f"{path} cannot be read as safetensors ({error}); {HOW_TO_GET}") from None
    wrong = {n: s for n, s in _shapes().items() if n not in tensors or tensors[n].shape != s}
    if wrong:
        name = min(wrong)
        there = tensors[name].shape if name in tensors else "not there"
        raise UsageError(f"in {path} {name} is {there}, expected the shape {wrong[name]}; {HOW_TO_GET}")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    found = _checksum(tensors)
    if found != header.get("__metadata__", {}).get("sha256"):
        raise UsageError(f"the tensors of {path} are not what was converted (their checksum differs); {HOW_TO_GET}")
    return unflatten_dict(tensors, sep="."), found


def inception_features(
    mesh: Mesh, *, preprocessing: Preprocessing = "tensorflow", path: epath.PathLike | None = None, batch_size: int = 64
) -> Features:
    """Inception's features and logits for uint8 images of any size. Raises UsageError if the weights are missing."""
    if preprocessing not in get_args(Preprocessing):
        raise UsageError(f"got preprocessing {preprocessing!r}, expected one of {', '.join(get_args(Preprocessing))}")
    params, checksum = load_inception(path)

    def compute(params, images):
        return InceptionV3().apply({"params": params}, preprocess(images, preprocessing))

    name = f"{INCEPTION}, {preprocessing}, weights {checksum[:16]}"
    return Features(name, on_devices(compute, params, mesh, batch_size))
