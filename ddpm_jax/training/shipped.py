"""The results that come with the package, trained and measured: results/NAME/, made by `ddpm-jax convert to-result`.

    NAME/result.json            config, command, hardware, time, curve, evaluations, and size and SHA-256 of the other files
    NAME/weights.safetensors    the EMA parameters
    NAME/samples.png            the first 64 samples of seed 0; not in the wheel

Their folder lies beside the package in the repository, and inside of it once it is installed.
"""

import difflib
from pathlib import Path
from typing import Any

from etils import epath

from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import DamagedFileError, digest, fingerprint, read_json

PACKAGE = Path(__file__).parent.parent
FOLDER = PACKAGE / "results" if (PACKAGE / "results").is_dir() else PACKAGE.parent / "results"
RESULT, WEIGHTS, SAMPLES = "result.json", "weights.safetensors", "samples.png"
PREFIX = "pretrained:"


def shipped_results() -> dict[str, epath.Path]:
    """The folders of the shipped results, by name."""
    return {path.parent.name: epath.Path(path.parent) for path in sorted(FOLDER.glob(f"*/{RESULT}"))}


def read_result(folder: epath.Path) -> dict[str, Any]:
    """A result without its digest. Raises DamagedFileError if it does not match it."""
    path = folder / RESULT
    result = read_json(path)
    if result.pop("sha256", None) != digest(result):
        raise DamagedFileError(path, "it is not what was written there", "install the package again")
    return result


def pretrained_file(name: str) -> epath.Path:
    """The weights of `pretrained:NAME`, whose digest is checked.

    Raises UsageError if there are none of this name, with what is named most alike, and DamagedFileError if they have changed.
    """
    there = {key: folder for key, folder in shipped_results().items() if (folder / WEIGHTS).exists()}
    key = name.removeprefix(PREFIX)
    if key not in there:
        near = difflib.get_close_matches(key, there, n=1)
        known = ", ".join(PREFIX + key for key in there) or "none"
        hint = f"perhaps you meant {PREFIX}{near[0]}" if near else f"those there are {known}"
        raise UsageError(f"{name} does not come with this package; {hint}")
    path = there[key] / WEIGHTS
    if read_result(there[key])["files"].get(WEIGHTS) != fingerprint(path):
        raise DamagedFileError(path, "it is not what was written there", "install the package again")
    return path
