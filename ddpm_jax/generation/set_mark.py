"""OUT/set.json: the definition of a set of images, whether it is complete, and the checksums of its files."""

import dataclasses
import json
from typing import Any

from etils import epath
from tqdm import tqdm

from ddpm_jax.core.files import MOST_BYTES, DamagedFileError, advising, digest, fingerprint, read_json, write_text

SET = "set.json"
MOST_TOLD = 10  # damaged files that are reported one by one


@dataclasses.dataclass(frozen=True)
class Mark:
    """The content of set.json: the set's definition, whether it is complete, and the checksums of its files."""

    definition: dict[str, Any]
    complete: bool = False
    files: dict[str, Any] | None = None  # size and SHA-256 by name; None in sets of earlier versions
    batches: list[Any] = dataclasses.field(default_factory=list)  # SHA-256 of the pixels of each batch

    def write(self, folder: epath.Path) -> None:
        """Writes set.json."""
        values = {"set": self.definition, "complete": self.complete, "files": self.files, "batches": self.batches}
        values["sha256"] = digest(values)
        write_text(folder / SET, json.dumps(values, indent=2) + "\n")


def read_mark(folder: epath.Path, *, most: int = MOST_BYTES) -> Mark:
    """Reads the folder's set.json. Raises FileNotFoundError or DamagedFileError."""
    path = folder / SET
    with advising("give another --out"):
        values = read_json(path, most=most)
        proof, of_an_earlier_version = values.pop("sha256", None), set(values) == {"set", "complete"}
        if not of_an_earlier_version and proof != digest(values):
            raise DamagedFileError(path, "it is not what was written")
        mark = Mark(values.get("set"), values.get("complete"), values.get("files"), values.get("batches", []))
        if not isinstance(mark.definition, dict) or not isinstance(mark.complete, bool):
            raise DamagedFileError(path, "it describes no set of images")
    return mark


def is_listed(path: epath.Path) -> bool:
    """Whether a file beside set.json matches its listing. Reports a damaged one."""
    there, files = fingerprint(path), read_mark(path.parent).files
    if there is None:
        return False
    if files is None or files.get(path.name) == there:
        return True
    tell([f"{path} is damaged (it is not what set.json lists) and is made again"])
    return False


def add_to_list(path: epath.Path) -> None:
    """Adds a file beside set.json to its list."""
    mark = read_mark(path.parent)
    if mark.files is not None:
        dataclasses.replace(mark, files=mark.files | {path.name: fingerprint(path)}).write(path.parent)


def tell(sentences: list[str]) -> None:
    """Reports damaged files, the first MOST_TOLD of them one by one."""
    for sentence in sentences[:MOST_TOLD]:
        tqdm.write(sentence)
    if len(sentences) > MOST_TOLD:
        tqdm.write(f"and so are {len(sentences) - MOST_TOLD} more files")
