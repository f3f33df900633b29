"""Sources of images, and `open_source`, which opens one by name.

To add a kind, write a function name -> Arrays or Pictures, and add it to `SOURCES`.
"""

import collections
import difflib
import functools
import hashlib
import os
import posixpath
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped
from tqdm import tqdm

from ddpm_jax.config import DataConfig
from ddpm_jax.core import room
from ddpm_jax.core.errors import UsageError, import_extra
from ddpm_jax.core.files import digest
from ddpm_jax.data import idx, tfds
from ddpm_jax.data.cache import NAMED, decode_once, without_bad
from ddpm_jax.data.conditions import PAIRED, Joined, in_order_of, source_of_conditions
from ddpm_jax.data.folders import HIDDEN, find_files
from ddpm_jax.data.pictures import ENDINGS, PAGED, DecodedPictures, Pictures
from ddpm_jax.data.pixels import Pixels

DECODE_ONCE_BYTES = 2**33  # the largest cache of data.cache=auto: CelebA-HQ at 256 has 6 GB, LSUN church 25 GB
DIGEST_BYTES = 2**26  # of images hashed at a time
MOST_BYTES = 2**29  # of an encoded picture: 8192 x 8192 pixels of four 16-bit channels, uncompressed
SAMPLED = 16  # images whose values are compared with their range
NARROW = 0.25  # share of the range below which a note is told
MOST_SHOWN = 200  # characters of a name in a message
GREY, RGB = 1, 3  # channels of pictures


@dataclass(frozen=True)
class Source:
    """Images of one size.

    Attributes:
        images: uint8 (N, H, W, C), or float32 with data.value_range, in memory, memory-mapped or decoded at each read.
        read_labels: () -> int (N,), or None if there are none.
        read_classes: () -> the classes' names; none if they have no names.
        identity: The fingerprint of the data set. A checkpoint records it, and a resume with another one is refused.
        stamp: A second fingerprint, for caches and a resume's note. It changes whenever the content does, and may more often.
        conditions: Of data.condition=paired: (N, H, W, K), stored like the images.
    """

    images: np.ndarray | DecodedPictures
    read_labels: Callable[[], np.ndarray | None]
    identity: dict[str, str | int]
    read_classes: Callable[[], Sequence[str]] = tuple
    conditions: np.ndarray | DecodedPictures | None = None
    stamp: str = ""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def read(self, indices: np.ndarray) -> Shaped[np.ndarray, "n H W C"]:
        """The images at these indices, (n, H, W, C). Raises PictureError if one cannot be decoded."""
        return self.images[indices]

    @functools.cached_property
    def rows(self) -> np.ndarray | DecodedPictures | Joined:
        """What a training step is given: the images, and with paired conditions these as further channels."""
        return self.images if self.conditions is None else Joined(self.images, self.conditions)

    def read_rows(self, indices: np.ndarray) -> Shaped[np.ndarray, "n H W D"]:
        """The rows at these indices. Raises PictureError if a picture cannot be decoded."""
        return self.read(indices) if self.conditions is None else self.rows[indices]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """The class of each image, int (N,), or None if there are none."""
        return self.read_labels()

    def labels_of(self, num_classes: int) -> np.ndarray | None:
        """The labels for a network of so many classes, int32 (N,); None for a network without classes.

        Raises UsageError if the images have no labels, or some of other classes.
        """
        if not num_classes:
            return None
        if self.labels is None:
            raise UsageError(
                f"model.num_classes={num_classes}, but the images have no labels; put them into a folder for each class, give "
                "labels in an .npz file, or set model.num_classes to 0"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= num_classes:
            raise UsageError(
                f"model.num_classes={num_classes}, but the images' labels are {low} to {high}; set it to {high + 1}, or "
                "change the labels"
            )
        return self.labels.astype(np.int32)

    def in_classes_of(self, names: Sequence[str]) -> "Source":
        """The source with the classes of these names: its own, found by name. As it is where either has no names.

        Names that are paths may differ in the folders that all of a source have: train/cat and train/dog, test/cat and test/dog.

        Its labels raise UsageError if there are images of a class without one of these names, or labels without a class.
        """

        def read_labels() -> np.ndarray | None:
            own, labels = list(self.read_classes()), self.labels
            if labels is None or not own or not names or own == list(names):
                return labels
            if labels.min() < 0 or labels.max() >= len(own):
                raise UsageError(
                    f"the images name {len(own)} classes, but their labels are {labels.min()} to {labels.max()}; name all of "
                    "them, or change the labels"
                )
            used, wanted, called = np.unique(labels), list(names), own
            if any(own[label] not in wanted for label in used):
                wanted, called = without_shared_folders(names), without_shared_folders(own)
            places = {name: i for i, name in enumerate(wanted)}
            if missing := [own[label] for label in used if called[label] not in places]:
                missing = [name for name in missing if name not in names] or missing
                raise UsageError(
                    f"the images have the class {missing[0]!r}, and the run has {', '.join(map(str, names[:NAMED]))}; "
                    "name the classes alike, or leave its images out"
                )
            return np.array([places.get(name, -1) for name in called])[labels]

        return replace(self, read_labels=read_labels, read_classes=lambda: names or self.read_classes())


def without_shared_folders(names: Sequence[str]) -> list[str]:
    """Names without the leading folders that all of them have: train/cat, train/dog -> cat, dog."""
    parts = [str(name).split("/") for name in names]
    while parts and all(len(path) > 1 and path[0] == parts[0][0] for path in parts):
        parts = [path[1:] for path in parts]
    return ["/".join(path) for path in parts]


class Arrays(NamedTuple):
    """A source that holds arrays: uint8 or float32 images (N, H, W) or (N, H, W, C); labels int (N,) or None; classes' names;
    conditions like the images, or None.
    """

    images: np.ndarray
    labels: np.ndarray | None
    classes: Sequence[str] = ()
    conditions: np.ndarray | None = None


def digits(name: str) -> Arrays:
    """The 1,797 handwritten 8x8 digits of scikit-learn, grey, with 0..16 scaled to 0..255; labels 0 to 9."""
    data = import_extra("sklearn.datasets", "evaluation", "data.source=digits").load_digits()
    return Arrays(np.round(data.images * (255 / 16)).astype(np.uint8)[..., None], data.target, "0123456789")


def array_file(name: str) -> Arrays:
    """The images of an .npy file, or the arrays `images` and (optional) `labels`, `classes`, `conditions` of an .npz file."""
    if not os.path.isfile(name):
        raise UsageError(f"data.source={name!r} is not a file; give the path of an .npy or .npz file of images")
    try:
        content = np.load(name, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return Arrays(content, None)
        with content:
            needed = sum(entry.file_size for entry in content.zip.infolist() if entry.filename == "images.npy")
            room.check_memory(needed, f"the array images of {name}", "store it as an .npy file, which is mapped")
            arrays = {key: content[key] for key in ("images", "labels", "classes", "conditions") if key in content}
    except UsageError:
        raise
    except Exception as error:  # a broken file raises almost anything
        raise UsageError(
            f"{name} cannot be read as an array file ({error}); write it with numpy.save or numpy.savez"
        ) from None
    if "images" not in arrays:
        raise UsageError(f"{name} has the arrays {', '.join(content.files)}, expected one named images")
    classes = [str(name) for name in arrays.get("classes", np.array([]))]
    return Arrays(arrays["images"], arrays.get("labels"), classes, arrays.get("conditions"))


def idx_file(name: str) -> Arrays:
    """The images of a gzip-compressed IDX file, MNIST's format, and the labels of the file beside it."""
    if not os.path.isfile(name):
        raise UsageError(f"data.source={name!r} is not a file; give the path of a file like train-images-idx3-ubyte.gz")
    return Arrays(*idx.read_images(name))


def folder(name: str) -> Pictures:
    """The pictures of a folder and its sub-folders, sorted by relative name; each sub-folder is a class."""
    files = find_files(name)
    chosen = _choose(name, files)
    paths = [files[relative] for relative in chosen]
    try:
        stats = [os.stat(path) for path in paths]
    except OSError as error:
        raise UsageError(
            f"data.source={name!r} has a picture that cannot be found ({error}); remove it or its link"
        ) from None
    # Reading a pipe would block forever, and a device may have no end.
    if other := [path for path, stat in zip(paths, stats, strict=True) if not S_ISREG(stat.st_mode)]:
        raise UsageError(
            f"data.source={name!r} has {len(other)} names of pictures that are not regular files but pipes, "
            f"sockets or devices, such as {other[0]}; remove them"
        )
    sizes, times = [stat.st_size for stat in stats], digest([stat.st_mtime_ns for stat in stats])
    return _in_folders(chosen, sizes, sizes, lambda i: Path(paths[i]).read_bytes(), times)


def zip_file(name: str) -> Pictures:
    """The pictures of a zip file, read in place; sorted and labelled like a folder's."""
    if not os.path.isfile(name):
        raise UsageError(f"data.source={name!r} is not a file; give the path of a .zip file of pictures, or a folder")
    try:
        archive = zipfile.ZipFile(name)
    except Exception as error:  # a broken file raises almost anything
        raise UsageError(f"{name} cannot be read as a zip file ({error}); copy or pack it again") from None
    entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
    chosen = [entries[inside] for inside in _choose(name, entries)]
    names, sizes = [entry.filename for entry in chosen], [entry.file_size for entry in chosen]
    contents = [(entry.file_size, entry.CRC) for entry in chosen]
    return _in_folders(names, sizes, contents, lambda i: archive.read(chosen[i]), "")  # which checks the CRC


def _in_folders(
    names: Sequence[str], sizes: Sequence[int], contents: Sequence, read: Callable[[int], bytes], stamp: str
) -> Pictures:
    """Pictures whose folders are their classes.

    sizes: of each file in bytes; one above MOST_BYTES is refused when it is read. contents: what identifies each beside its name.
    read: index -> encoded content. stamp: as of `Pictures`.
    """

    def checked(i):
        if sizes[i] > MOST_BYTES:
            raise ValueError(f"its {room.gib(sizes[i])} are more than {room.gib(MOST_BYTES)}")
        return read(i)

    return Pictures(
        names=names,
        read=checked,
        labels=lambda: _folder_labels(names),
        identity={"images": len(names), "sha256": digest(list(zip(names, contents, strict=True)))},
        stamp=stamp,
        classes=lambda: _folders_of(names)[0].tolist(),
    )


SOURCES: dict[str, Callable[[str], Arrays | Pictures]] = {
    "digits": digits,
    "tfds:NAME": tfds.pictures,
    ".npy": array_file,
    ".npz": array_file,
    ".gz": idx_file,
    ".zip": zip_file,
    "a folder": folder,
}


def open_source(config: DataConfig) -> Source:
    """Opens the source `data.source`, decoded once or at each read as `data.cache` says, with its paired conditions if any.

    Raises UsageError if it cannot be used. Bad pictures raise here only if they are decoded once.
    """
    content = open_content(config.source)
    if not isinstance(content, Arrays) and config.on_bad_image == "skip":
        before, content = len(content.names), without_bad(decoded(content, config), config.source)
        tqdm.write(f"Note: {before - len(content.names)} of {before} pictures are left out; they cannot be decoded.")
    source = _opened(config, content)
    if config.condition != PAIRED:
        return source
    of_conditions = _opened(
        source_of_conditions(config, config.condition_source or config.source), _read_conditions(config, content)
    )
    if len(of_conditions) != len(source):
        raise UsageError(
            f"data.source={config.source!r} has {len(source)} images, but there are {len(of_conditions)} conditions; give one "
            "for each"
        )
    identity = source.identity | {"conditions": digest(of_conditions.identity)}
    stamp = source.stamp + of_conditions.stamp
    return replace(source, identity=identity, conditions=of_conditions.images, stamp=stamp)


def _opened(config: DataConfig, content: Arrays | Pictures) -> Source:
    if isinstance(content, Arrays):
        source = _of_arrays(config, content)
    else:
        images = decoded(content, config)
        once = config.cache in ("device", "host") or (config.cache == "auto" and images.nbytes <= DECODE_ONCE_BYTES)
        kept = decode_once(images) if once else images
        source = Source(kept, content.labels, content.identity, content.classes, stamp=content.stamp)
    _note_narrow_values(config, source.images)
    return source


def _note_narrow_values(config: DataConfig, images: np.ndarray | DecodedPictures) -> None:
    """Tells of images that use little of their range, such as 12 bits in files of 16, by a few of them."""
    count = min(len(images), SAMPLED, max(1, DIGEST_BYTES * len(images) // images.nbytes))
    chosen = np.linspace(0, len(images) - 1, count).astype(int)
    sample, errors = images.attempts(chosen) if isinstance(images, DecodedPictures) else (images[chosen], [])
    if errors:  # a bad picture is told when it is needed
        return
    (low, high), least, greatest = config.value_range or (0, 255), float(sample.min()), float(sample.max())
    share = (greatest - least) / (high - low)
    if share < NARROW:
        remedy = "scale them, or set it to the range that they have"
        if not config.value_range:
            remedy = (
                "scale them; for 16-bit files that hold fewer, e.g. 12, set data.value_range to what they hold, 0 4095"
            )
        _tell(
            f"Note: the values of {count} of the {len(images)} images of {config.source} go from {least:g} to {greatest:g}, "
            f"{share:.2%} of {'data.value_range' if config.value_range else 'the 8 bits that are kept'}; {remedy}."
        )


def _read_conditions(config: DataConfig, images: Arrays | Pictures) -> Arrays | Pictures:
    """The paired conditions of the images, in their order."""
    if not config.condition_source:
        if isinstance(images, Arrays) and images.conditions is not None:
            return Arrays(images.conditions, None)
        raise UsageError(
            f"data.condition=paired, but data.source={config.source!r} holds no conditions; name them with "
            "data.condition_source, or give an .npz file with the arrays images and conditions"
        )
    content = open_content(config.condition_source)
    if isinstance(content, Arrays) != isinstance(images, Arrays):
        raise UsageError(
            f"data.condition_source={config.condition_source!r} and data.source={config.source!r} are a file of arrays and "
            "encoded pictures, which have no names in common; give two of one kind"
        )
    if isinstance(content, Arrays) or isinstance(images, Arrays):
        return content
    return in_order_of(images, content, f"data.condition_source={config.condition_source!r}")


def open_conditions(config: DataConfig) -> Source:
    """Opens `data.source` as conditions of the config's size and channels: an .npz file's array `conditions` if it has one."""
    content = open_content(config.source)
    if isinstance(content, Arrays) and content.conditions is not None:
        content = Arrays(content.conditions, None)
    return _opened(config, content)


def open_pictures(source: str) -> Pictures:
    """The encoded pictures of a source. Raises UsageError for a source of arrays."""
    content = open_content(source)
    if isinstance(content, Arrays):
        raise UsageError(f"{source} holds arrays, not encoded pictures; there is nothing to prepare or check")
    return content


def decoded(pictures: Pictures, config: DataConfig) -> DecodedPictures:
    """The pictures as an array of the config's size and channels, decoded at each read.

    Raises UsageError if one image of this size does not fit in memory.
    """
    of_one_page = (GREY,) if config.value_range else (GREY, RGB)
    if config.channels not in of_one_page and not all(name.lower().endswith(PAGED) for name in pictures.names):
        raise UsageError(
            f"data.channels={config.channels}, but pictures give {GREY} (grey) or {RGB} (RGB), and {GREY} with data.value_range; "
            "use one of these, or store the images as an .npy file, or each as a .tif file with a page for each channel"
        )
    height, width = config.size
    room.check_memory(
        height * width * (4 + config.channels),  # Pillow holds 4 bytes a pixel
        f"one picture of {height} x {width} pixels",
        "choose a smaller data.image_size",
    )
    return DecodedPictures(pictures, config)


def find_kind(name: str) -> str:
    """The key of SOURCES for a name. Raises UsageError, with similar names, if there is no such path or kind."""
    if name.startswith(tfds.PREFIX):
        return "tfds:NAME"
    if name in SOURCES:
        return name
    kinds = f"use one of {', '.join(SOURCES)} (endings stand for a file's path)"
    if not os.path.exists(name):
        near = _near_names(name)
        hint = f"perhaps you meant {' or '.join(near)}; else " if near else ""
        raise UsageError(f"data.source={name[:MOST_SHOWN]!r} does not exist; {hint}{kinds}")
    kind = Path(name).suffix.lower()
    if kind not in SOURCES and os.path.isdir(name):
        kind = "a folder"
    if kind not in SOURCES:
        raise UsageError(f"data.source={name!r} is a file of an unknown kind; {kinds}")
    return kind


def _near_names(name: str) -> list[str]:
    """Sources with a similar name: those without a path, and files beside the first missing part of the path."""
    pathless = {kind: kind for kind in SOURCES if kind.isalpha()} | {set: tfds.PREFIX + set for set in tfds.COMMON}
    near = [pathless[match] for match in difflib.get_close_matches(name[:MOST_SHOWN].lower(), pathless, n=1)]
    missing = Path(name)
    while not os.path.exists(missing.parent):
        missing = missing.parent
    try:
        beside = [file.name for file in os.scandir(missing.parent) if not file.name.startswith(HIDDEN)]
    except OSError:
        beside = []
    return near + [str(missing.parent / match) for match in difflib.get_close_matches(missing.name, beside, n=2)]


def open_content(name: str) -> Arrays | Pictures:
    """What a source holds, before it is decoded. Raises UsageError if there is none of this name."""
    return SOURCES[find_kind(name)](name)


def _of_arrays(config: DataConfig, arrays: Arrays) -> Source:
    name, (images, labels, classes, _) = config.source, arrays
    expected_type = Pixels(config.value_range).dtype
    if images.dtype != expected_type or images.ndim not in (3, 4) or len(images) == 0:
        remedy = "; float32 values need data.value_range" if images.dtype == np.float32 != expected_type else ""
        raise UsageError(
            f"data.source={name!r} has {images.dtype} values of shape {images.shape}, "
            f"expected {expected_type} of shape (N, H, W) or (N, H, W, C) and at least one image{remedy}"
        )
    if images.ndim == 3:
        images = images[..., None]
    expected = (*config.size, config.channels)
    if images.shape[1:] != expected:
        raise UsageError(
            f"data.source={name!r} has images of shape {images.shape[1:]}, but data.image_size and data.channels say "
            f"{expected}; change these or the images"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise UsageError(
            f"data.source={name!r} has labels of type {labels.dtype} and shape {labels.shape}, "
            f"expected whole numbers of shape ({len(images)},)"
        )
    sha = hashlib.sha256(str(images.shape).encode())
    count = max(1, DIGEST_BYTES * len(images) // images.nbytes)
    for first in range(0, len(images), count):
        block = images[first : first + count]
        if config.value_range:
            _check_values(name, block, config.value_range)
        sha.update(block.tobytes())
    if labels is not None:
        sha.update(labels.astype(np.int64).tobytes())
    return Source(images, lambda: labels, {"images": len(images), "sha256": sha.hexdigest()}, lambda: classes)


def _check_values(name: str, images: np.ndarray, value_range: tuple[float, float]) -> None:
    low, high = map(np.float32, value_range)
    least, greatest = images.min(), images.max()
    if not (low <= least and greatest <= high):  # also if one is not a number
        raise UsageError(
            f"data.source={name!r} has values from {least:g} to {greatest:g}, but data.value_range is {value_range}; "
            "declare the range that they have, or change the images"
        )


def _choose(source: str, names) -> list[str]:
    """The names with a picture's ending, sorted. Skips hidden files silently, and other files with a note."""
    seen = [name for name in names if not ("/." in (inside := f"/{name}") or "/__MACOSX" in inside)]
    chosen = sorted(name for name in seen if name.lower().endswith(ENDINGS))
    if not chosen:
        raise UsageError(f"data.source={source!r} has no pictures; expected files that end in {', '.join(ENDINGS)}")
    others = collections.Counter(
        posixpath.splitext(name)[1].lower() or "without an ending" for name in set(seen) - set(chosen)
    )
    if others:
        endings = [f"{others[ending]} {ending}" for ending in sorted(others, key=lambda e: (-others[e], e))]
        more = ", ..." if len(endings) > NAMED else ""
        _tell(
            f"Note: {others.total()} of the files in {source} do not end like a picture and are left out: "
            f"{', '.join(endings[:NAMED])}{more}."
        )
    return chosen


_tell = functools.cache(tqdm.write)  # once for a source that is opened twice


def _folder_labels(names: Sequence[str]) -> np.ndarray | None:
    """The index of each picture's folder among the sorted folders; None if there is only one."""
    classes, labels = _folders_of(names)
    return labels if len(classes) > 1 else None


def _folders_of(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The sorted folders of pictures, and the place of each picture's folder among them."""
    return np.unique([posixpath.dirname(name) for name in names], return_inverse=True)
