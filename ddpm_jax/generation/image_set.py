"""A set of generated images on disk, written batch by batch, so that it resumes after a kill.

    OUT/set.json              the set's definition, whether it is complete, and size and SHA-256 of every file
    OUT/parts/000000.npz      the batch from image 0 on, written after its PNGs: it marks the batch as done
    OUT/000000.png, ...       single images, format `png` and `both`
    OUT/images.npz            all images, joined from the parts at the end, with classes their labels; format `npz` and `both`
    OUT/images.npy            the images as an array without an archive, format `npy`
    OUT/grid.png              the first 64, as 8-bit pictures

Images are uint8, or float32 with data.value_range. PNG holds those of 8 bits that are grey or RGB. Format `shards` keeps the
parts, for sets too large for one file. Missing or damaged files are reported and made again: from intact copies of the same
images in the set, or else by sampling their batches again.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8
from PIL import Image
from tqdm import tqdm

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import (
    LOCK,
    MOST_BYTES,
    DamagedFileError,
    advising,
    check_place,
    digest,
    fingerprint,
    is_regular,
    is_remnant,
    read_bytes,
    remove_remnants,
    sole_writer,
    whole,
    write_bytes,
)
from ddpm_jax.core.room import check_disk
from ddpm_jax.data.arrays import parse_arrays, write_arrays
from ddpm_jax.data.pixels import EIGHT_BITS, Pixels
from ddpm_jax.data.sheets import class_grid, enlarge, grid, png_bytes
from ddpm_jax.generation.generator import (
    Batches,
    batch_ranges,
    check_batch,
    generate_batches,
    make_generator,
    parameters,
    sample_key,
)
from ddpm_jax.generation.labels import Table, label_table
from ddpm_jax.generation.options import Format, SamplerOptions
from ddpm_jax.generation.set_mark import SET, Mark, read_mark, tell
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.workdir import Run

ONE_FILE = {"npz": "images.npz", "both": "images.npz", "npy": "images.npy"}  # by format
GRID = "grid.png"
GRID_IMAGES = 64
MOST_LABELS = 1000  # that set.json lists; of more it has the digest
BYTES_OF_A_LINE = 200  # of set.json for each file and batch; an upper bound


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class ImageSet:
    """The images of `batches`, of an image_shape (H, W, C), in a folder that is locked until `close`.

    definition: everything that the images depend on, as JSON values. pixels: how they are stored. Raises UsageError if the
    folder holds another set or other files, or cannot be written.
    """

    def __init__(
        self,
        folder: epath.Path,
        batches: Batches,
        image_shape: tuple[int, int, int],
        definition: dict[str, Any],
        *,
        format: Format,
        pixels: Pixels = EIGHT_BITS,
    ):
        self.folder = folder
        self.parts = folder / "parts"
        self.batches = batches
        self.image_shape = image_shape
        self.pixels = pixels
        self.image_bytes = math.prod(image_shape) * pixels.dtype.itemsize
        self.format = format
        self.has_pngs, self.one_file = format in ("png", "both"), ONE_FILE.get(format)
        self.classes: tuple[Table, Sequence[str]] | None = None  # the labels in turn, and the classes' names
        definition = definition | {"images": [batches.indices.start, batches.indices.stop], "format": format}
        self.mark = Mark(json.loads(json.dumps(definition)), files={})
        self.identity = digest(definition)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._pending: Future | None = None
        self._held = contextlib.ExitStack()
        try:
            self._enter()
        except BaseException:
            self.close()
            raise

    def _enter(self) -> None:
        if not os.path.exists(self.folder / SET):
            check_place(self.folder / SET, "give another --out")
        begun = not self.folder.exists() or (self.folder / SET).exists()
        if not begun and not all(is_remnant(path, SET) or path.name == LOCK for path in self.folder.iterdir()):
            raise UsageError(f"--out {self.folder} has files but no {SET}; give an empty or a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(sole_writer(self.folder))
        for folder in (self.folder, self.parts):
            remove_remnants(folder)
        if (self.folder / SET).exists():
            self._take(read_mark(self.folder, most=MOST_BYTES + BYTES_OF_A_LINE * len(self.batches.indices)))
        else:
            self.mark.write(self.folder)
        if not self.mark.complete:  # after the mark, so that a kill in between leaves a folder of this set
            self.parts.mkdir(exist_ok=True)

    def _take(self, mark: Mark) -> None:
        there, here = mark.definition, self.mark.definition
        if different := [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]:
            fields = ", ".join(f"{name} (there {there.get(name)}, here {here.get(name)})" for name in different)
            raise UsageError(
                f"--out {self.folder} holds another set of images, which differs in {fields}; give another --out"
            )
        self.mark = mark

    def close(self) -> None:
        """Waits for pending writes and unlocks the folder."""
        self._writer.shutdown()
        self._held.close()

    # ---- Missing and damaged files

    def missing(self) -> list[range]:
        """The batches to sample, as ranges of places in `batches`. Reports damaged files and recovers what it can.

        Raises UsageError if the disk has no room.
        """
        if self.mark.complete:
            if self.mark.files is None:
                said = "is complete, but an earlier version recorded no checksums, so it cannot be verified"
                tell([f"{self.folder} {said}"])
            damaged = dict(self._damaged())
            if not damaged:
                return []
            tell([f"{path} is damaged ({reason}) and is made again" for path, reason in damaged.items()])
            self._reopen(damaged)
        self._check_room()
        done = sorted(self._parts_that_are_there())
        edges = [-1, *done, len(self.batches)]
        return [range(a + 1, b) for a, b in itertools.pairwise(edges) if a + 1 < b]

    def _names(self) -> Iterator[str]:
        """The names of all files of the complete set."""
        if self.has_pngs:
            yield from (f"{i:06d}.png" for i in self.batches.indices)
        if self.format == "shards":
            yield from (f"parts/{part.start:06d}.npz" for part in self.batches)
        if self.one_file:
            yield self.one_file
        yield GRID

    def _damaged(self) -> Iterator[tuple[epath.Path, str]]:
        for name in self._names():
            path = self.folder / name
            if self.mark.files is None and is_regular(path):
                continue
            there = fingerprint(path)
            if there is None:
                yield path, "it is missing"
            elif self.mark.files is not None and self.mark.files.get(name) != there:
                yield path, f"its {there[0]:,} bytes do not match their checksum"

    def _reopen(self, damaged: dict[epath.Path, str]) -> None:
        """Marks the set as incomplete, and restores the parts of intact batches from its other files."""
        self.parts.mkdir(exist_ok=True)
        for path in damaged:
            if path.parent == self.parts:
                path.unlink(missing_ok=True)
        for part, proof in zip(self.batches, self.mark.batches, strict=False):
            if self._part(part).exists():
                continue
            for read in (self._from_one_file, self._from_pngs):
                images = None
                with contextlib.suppress(Exception):  # a damaged file can raise any error
                    images = read(part)
                if images is not None and _sha(images.tobytes()) == proof:
                    self._write(part, images)
                    break
        self.mark = dataclasses.replace(self.mark, complete=False, files=self.mark.files or {})
        self.mark.write(self.folder)

    def _from_one_file(self, part: range) -> np.ndarray | None:
        if not self.one_file or not is_regular(path := self.folder / self.one_file):
            return None
        size, head = self.image_bytes, io.BytesIO()
        with self._array(head):
            start = head.tell()  # of the pixels, computed, since the file's header may be damaged
        with path.open("rb") as file:
            file.seek(start + (part.start - self.batches.indices.start) * size)
            return np.frombuffer(file.read(len(part) * size), self.pixels.dtype).reshape(-1, *self.image_shape)

    def _from_pngs(self, part: range) -> np.ndarray | None:
        if not self.has_pngs:
            return None
        pictures = [np.asarray(Image.open(io.BytesIO(read_bytes(self._png(i))))) for i in part]
        return np.stack(pictures).reshape(-1, *self.image_shape)

    def _check_room(self) -> None:
        image, count = self.image_bytes, len(self.batches.indices)
        left = max(0, count - self.batches.size * sum(1 for _ in self.parts.glob("*.npz")))
        needed = image * (left + (left // 2 if self.has_pngs else 0) + (count if self.one_file else 0))
        advice = "make room, give an --out on another disk, or ask for fewer --num-images"
        check_disk(self.folder, needed, f"a set of {count:,} images, --format {self.format},", advice)

    def _parts_that_are_there(self) -> Iterator[int]:
        """The places in `batches` of the intact parts. Reports damaged ones, which are overwritten later."""
        indices, size, damaged = self.batches.indices, self.batches.size, []
        for path in sorted(self.parts.iterdir()):
            start = int(path.stem) if path.stem.isdecimal() else -1
            if path.name != f"{start:06d}.npz" or start not in indices[::size]:
                raise UsageError(f"{path} belongs to no batch of this set; move it away, or give another --out")
            place = (start - indices.start) // size
            try:
                self._read(self.batches[place])
            except DamagedFileError as error:
                damaged.append(f"{path} is damaged ({error.reason}) and is made again")
            else:
                yield place
        tell(damaged)

    # ---- Writing

    def _png(self, i: int) -> epath.Path:
        return self.folder / f"{i:06d}.png"

    def _part(self, part: range) -> epath.Path:
        return self.parts / f"{part.start:06d}.npz"

    def _of(self, part: range) -> str:
        return f"{self.identity} {part.start} {part.stop}"

    def _read(self, part: range) -> dict[str, np.ndarray]:
        """The arrays of a batch: `images`, and with PNGs their SHA-256 `pngs`. Raises DamagedFileError."""
        path = self._part(part)
        with advising("run the same command again"):
            if not is_regular(path):
                raise DamagedFileError(path, "it is missing")
            arrays = parse_arrays(path, path.read_bytes(), of=self._of(part))
            images = arrays.get("images", np.zeros(()))
            if images.dtype != self.pixels.dtype or images.shape != (len(part), *self.image_shape):
                raise DamagedFileError(path, f"it does not hold {len(part)} images of shape {self.image_shape}")
        return arrays

    def add(self, part: range, images: Shaped[np.ndarray, "n H W C"]) -> None:
        """Writes a batch in the background. Waits for the previous one, and raises its error."""
        self.wait()
        self._pending = self._writer.submit(self._write, part, images)

    def _write(self, part: range, images: np.ndarray) -> None:
        arrays = {"images": images}
        if self.has_pngs:
            arrays["pngs"] = np.array([self._write_png(*each)[1] for each in zip(part, images, strict=True)])
        write_arrays(self._part(part), arrays, of=self._of(part))

    def _write_png(self, i: int, image: np.ndarray) -> list[Any]:
        """Writes a PNG; returns its size and SHA-256."""
        content = png_bytes(image)
        write_bytes(self._png(i), content)
        return [len(content), _sha(content)]

    def wait(self) -> None:
        """Waits until all added batches are on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def finish(self) -> None:
        """Joins the parts as the format requires, draws the grid, and marks the set as complete, with all checksums.

        Raises DamagedFileError if a part is damaged.
        """
        self.wait()
        if not self.mark.complete:
            files, batches, first = dict(self.mark.files or {}), list[str](), list[np.ndarray]()
            with self._joined(self.one_file) if self.one_file else open(os.devnull, "wb") as joined:
                for part in self.batches:
                    arrays = self._read(part)
                    images = arrays["images"]
                    batches.append(_sha(images.tobytes()))
                    files |= self._list(part, arrays)
                    first += [*images[: GRID_IMAGES - len(first)]]
                    joined.write(images.tobytes())
            (self.folder / GRID).write_bytes(png_bytes(self._sheet(self.pixels.to_pictures(np.stack(first)))))
            for name in [GRID, self.one_file] if self.one_file else [GRID]:
                files[name] = fingerprint(self.folder / name)
            files = dict(sorted(files.items()))
            self.mark = dataclasses.replace(self.mark, complete=True, files=files, batches=batches)
            self.mark.write(self.folder)
        if self.format != "shards" and self.parts.exists():
            self.parts.rmtree()

    def _sheet(self, first: UInt8[np.ndarray, "n H W C"]) -> UInt8[np.ndarray, "h w c"]:
        if self.classes is None:
            return enlarge(grid(first))
        return class_grid(first, self._labels(len(first)), self.classes[1])

    def _labels(self, count: int) -> np.ndarray:
        """The labels of the first images of a set with classes."""
        assert self.classes is not None
        first = self.batches.indices.start
        return self.classes[0][np.arange(first, first + count) % len(self.classes[0])]

    def _list(self, part: range, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Size and SHA-256 of a batch's files. Reports and rewrites PNGs that were damaged since they were written."""
        if self.format == "shards":
            return {f"parts/{self._part(part).name}": fingerprint(self._part(part))}
        if not self.has_pngs:
            return {}
        files, damaged = {}, []
        for i, image, sha in zip(part, arrays["images"], arrays["pngs"], strict=True):
            path = self._png(i)
            there = fingerprint(path)
            if there is None or there[1] != sha:
                damaged.append(f"{path} is damaged (it is not what was written) and is made again")
                there = self._write_png(i, image)
            files[path.name] = there
        tell(damaged)
        return files

    @contextlib.contextmanager
    def _joined(self, name: str) -> Iterator[IO[bytes]]:
        """Yields images.npz or .npy as a file to which the pixels are written."""
        with whole(self.folder / name) as temporary, temporary.open("wb") as file, self._array(file) as array:
            yield array

    @contextlib.contextmanager
    def _array(self, file: IO[bytes]) -> Iterator[IO[bytes]]:
        """Begins the array of all images in a file, for .npz inside of an archive, up to the pixels."""
        shape = (len(self.batches.indices), *self.image_shape)
        described = {"descr": np.lib.format.dtype_to_descr(self.pixels.dtype), "fortran_order": False, "shape": shape}
        with contextlib.ExitStack() as opened:
            array, archive = file, None
            if self.format != "npy":
                archive = opened.enter_context(zipfile.ZipFile(file, "w"))
                array = opened.enter_context(archive.open("images.npy", "w", force_zip64=True))
            np.lib.format.write_array_header_1_0(array, described)
            yield array
            if archive is not None and self.classes is not None:
                array.close()
                with archive.open("labels.npy", "w") as labels:
                    np.lib.format.write_array(labels, self._labels(shape[0]), allow_pickle=False)


def choose_format(experiment: Experiment, format: Format | None) -> Format:
    """The format asked for; without one `both`, or `npy` for images that PNG cannot hold.

    Raises UsageError if PNGs are asked for that cannot hold the images.
    """
    if experiment.makes_pictures:
        return format or "both"
    if format in ("both", "png"):
        raise UsageError(
            f"--format {format} writes PNG, which holds 8-bit images of 1 or 3 channels, and these are "
            f"{experiment.pixels.dtype} of {experiment.image_shape[-1]} channel(s); use --format npy, npz or shards"
        )
    return format or "npy"


def tables_of(run: Run, options: SamplerOptions) -> dict[str, Any]:
    """What the images of a run are drawn with, by the generator's argument.

    Raises UsageError if pictures are given to a run with classes, and nobody says of which class they are.
    """
    labels = label_table(options.labels, run.experiment.num_classes, run.classes)
    given = {} if run.given is None else run.given.tables
    if labels is None:
        return {**given}
    if given and not options.labels and options.guidance != 0:
        raise UsageError(
            "the run has classes, and pictures are given; say of which class they are by --labels, one for all, in turn or a "
            "file of one on each line, or leave the classes out by --guidance 0"
        )
    if "ends" in given and len(set(labels.tolist())) > 1 and options.guidance != 0:
        raise UsageError("--interpolate draws all its images of one class; give one by --labels, or --guidance 0")
    return {**given, "labels": labels}


def _definition(run: Run, options: SamplerOptions, labels: Table | None) -> dict[str, Any]:
    """What the images of any seed depend on."""
    values = {"step": run.step, "checkpoint": run.checkpoint, "weights": run.weights, **options.definition()}
    if run.guide is not None:
        values["guide"] = run.guide.checkpoint
    if run.given is not None:
        values |= {"given": run.given.definition}
    if labels is not None:
        values["labels"] = labels.tolist() if len(labels) <= MOST_LABELS else digest(labels.tolist())
    return values


def generate_set(
    run: Run,
    folder: epath.Path,
    indices: range,
    *,
    seed: int,
    options: SamplerOptions,
    batch_size: int,
    format: Format | None,
) -> None:
    """Generates the images `indices` of a seed into a folder, or resumes an incomplete set there.

    All processes compute; process 0 reads and writes the folder. Raises UsageError if the folder holds something else or is
    locked, the disk has no room, the format cannot hold the images (`choose_format`), or the sampler's options do not go
    together.
    """
    experiment, format = run.experiment, choose_format(run.experiment, format)
    generator = make_generator(run.experiment, run.mesh, options, guide=run.guide, given=run.given)
    tables = tables_of(run, options)
    labels = tables.get("labels")
    batches = batch_ranges(indices, batch_size=batch_size, num_devices=run.mesh.devices.size)
    # The rounded batch size: with another number of devices the parts could overlap.
    definition = _definition(run, options, labels) | {"seed": seed, "batch_size": batches.size}
    images: ImageSet | None = None

    def open_set() -> bytes:
        nonlocal images
        check_batch(experiment, run.mesh, batches.size)
        images = ImageSet(folder, batches, experiment.image_shape, definition, format=format, pixels=experiment.pixels)
        if labels is not None:
            images.classes = labels, run.classes
        return json.dumps([(gap.start, gap.stop) for gap in images.missing()]).encode()

    try:
        # Broadcast the missing batches from process 0.
        gaps = [range(*gap) for gap in json.loads(sharding.first_gives(open_set) or b"[]")]
        parts = (batches[place] for gap in gaps for place in gap)
        size = batches.size
        made = generate_batches(generator, parameters(run), sample_key(seed), parts, size=size, given=tables)
        before = len(indices) - sum(len(indices[gap.start * size : gap.stop * size]) for gap in gaps)
        with tqdm(total=len(indices), initial=before, unit="image", disable=images is None) as bar:
            for part, batch in made:
                if images is not None:
                    images.add(part, batch)
                bar.update(len(part))
        if images is not None:
            images.finish()
    finally:
        if images is not None:
            images.close()
