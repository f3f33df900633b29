"""A set of generated images on disk, made batch by batch: killed at any moment and started again, it continues.

    OUT/set.json              what defines the set, and whether it is complete
    OUT/parts/000000.npz      the batch from image 0 on, written after its PNGs: a batch is done when this is there
    OUT/000000.png, ...       single images, format `png` and `both`
    OUT/images.npz            all images, joined from the parts at the end, format `npz` and `both`
    OUT/grid.png              the first 64

With format `shards` the parts stay as they are, for sets too large for one file.
"""

import dataclasses
import json
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from ddpm_jax import sharding
from ddpm_jax.errors import UsageError
from ddpm_jax.files import is_remnant, whole, write_text
from ddpm_jax.generate import SamplerOptions, batch_ranges, generate_batches, make_generator, sample_key
from ddpm_jax.reporting import enlarge, grid, png_bytes
from ddpm_jax.workdir import Run

Format = Literal["both", "png", "npz", "shards"]
SET = "set.json"
GRID_IMAGES = 64


class ImageSet:
    """The images `indices` in a folder, as a definition says.

    definition: everything that the images depend on, a dict for JSON. Raises UsageError if the folder holds another set, or
    files that are none: nothing is ever mixed or written over.
    """

    def __init__(self, folder: epath.Path, indices: range, definition: dict[str, Any], *, format: Format):
        self.folder = folder
        self.indices = indices
        self.format = format
        self.definition = definition | {"images": [indices.start, indices.stop], "format": format}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._pending: Future | None = None
        self._enter()

    def _enter(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"--out {self.folder} is a file; give a folder")
        if (self.folder / SET).exists():
            there, self.complete = self._read_mark()
            names = sorted(there.keys() | self.definition.keys())
            different = [n for n in names if there.get(n) != json.loads(json.dumps(self.definition.get(n)))]
            if different:
                fields = ", ".join(f"{n} (there {there.get(n)}, here {self.definition.get(n)})" for n in different)
                raise UsageError(
                    f"--out {self.folder} holds another set of images, which differs in {fields}; give another"
                )
        elif self.folder.exists() and not all(is_remnant(path, SET) for path in self.folder.iterdir()):
            raise UsageError(f"--out {self.folder} has files but no {SET}; give an empty or a new folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mark(complete=False)
        if not self.complete:  # after the mark: killed in between, the folder is still this set's
            (self.folder / "parts").mkdir(exist_ok=True)

    def _read_mark(self) -> tuple[dict[str, Any], bool]:
        path = self.folder / SET
        try:
            content = json.loads(path.read_text())
            return dict(content["set"]), bool(content["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged or no set of images ({error!r}); give another --out") from None

    def _mark(self, *, complete: bool) -> None:
        self.complete = complete
        write_text(self.folder / SET, json.dumps({"set": self.definition, "complete": complete}, indent=2) + "\n")

    def _part(self, first: int) -> epath.Path:
        return self.folder / "parts" / f"{first:06d}.npz"

    def done(self, ranges: list[range]) -> int:
        """How many of these batches, in their order, are done."""
        if self.complete:
            return len(ranges)
        return next((i for i, part in enumerate(ranges) if not self._part(part.start).exists()), len(ranges))

    def add(self, part: range, images: UInt8[np.ndarray, "n H W C"]) -> None:
        """Writes a batch in the background, after the one before it; that one's failure is raised here."""
        self.wait()
        self._pending = self._writer.submit(self._write, part, images)

    def _write(self, part: range, images: np.ndarray) -> None:
        if self.format in ("png", "both"):
            for i, image in zip(part, images, strict=True):
                (self.folder / f"{i:06d}.png").write_bytes(png_bytes(image))
        with whole(self._part(part.start)) as temporary, temporary.open("wb") as file:
            np.savez(file, images=images)

    def wait(self) -> None:
        """Waits until everything added is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> None:
        """Joins the parts into what the format says, draws the grid and marks the set complete.

        Raises UsageError if the parts are not the set's images.
        """
        self.wait()
        self._writer.shutdown()
        parts = self.folder / "parts"
        if not self.complete:
            paths = sorted((p for p in parts.iterdir() if p.suffix == ".npz"), key=lambda p: int(p.stem))
            first: list[np.ndarray] = []
            count = 0
            for images in map(read_images, paths):
                if count < GRID_IMAGES:
                    first.append(images)
                count += len(images)
            if count != len(self.indices):
                raise UsageError(f"{parts} has {count} images of {len(self.indices)}; give another --out")
            (self.folder / "grid.png").write_bytes(png_bytes(enlarge(grid(np.concatenate(first)[:GRID_IMAGES]))))
            if self.format in ("npz", "both"):
                self._join(paths, first[0].shape[1:])
            self._mark(complete=True)
        if self.format != "shards" and parts.exists():
            parts.rmtree()

    def _join(self, paths: list[epath.Path], image_shape: tuple[int, ...]) -> None:
        """images.npz, part by part, so that no more than one is in memory."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.indices), *image_shape)}
        with (
            whole(self.folder / "images.npz") as temporary,
            temporary.open("wb") as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("images.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for part in paths:
                array.write(read_images(part).tobytes())


def generate_set(
    run: Run,
    folder: epath.Path,
    indices: range,
    *,
    seed: int,
    options: SamplerOptions,
    weights: str,
    batch_size: int,
    format: Format,
) -> None:
    """Generates the images `indices` of a seed into a folder, from wherever it is to the end, with a progress bar.

    The devices of all processes compute; the first process reads and writes the folder. Raises UsageError if the folder holds
    something else, or the sampler's options do not go together.
    """
    generator = make_generator(run.config, run.mesh, options)
    devices = run.mesh.devices.size
    ranges = batch_ranges(indices, batch_size=batch_size, num_devices=devices)
    definition = {"step": run.step, "checkpoint": run.checkpoint, "weights": weights, "seed": seed}
    # Of the parts, which the devices round up: on others that do not, they would overlap.
    definition |= {"batch_size": len(ranges[0]), **dataclasses.asdict(options)}
    images: ImageSet | None = None

    def open_set() -> int:
        nonlocal images
        images = ImageSet(folder, indices, definition, format=format)
        return images.done(ranges)

    done = sharding.first_decides(open_set)
    batches = generate_batches(
        generator, run.params, sample_key(seed), ranges[done:], batch_size=len(ranges[0]), num_devices=devices
    )
    before = sum(map(len, ranges[:done]))
    with tqdm(total=len(indices), initial=before, unit="image", disable=images is None) as bar:
        for part, batch in batches:
            if images is not None:
                images.add(part, batch)
            bar.update(len(part))
    if images is not None:
        images.finish()


def read_images(path: epath.Path) -> UInt8[np.ndarray, "n H W C"]:
    """The images of an .npz of this module."""
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays["images"]
