"""What a run tells: metrics.jsonl, TensorBoard events, image grids. All can be cut back to a step, so that none appears twice."""

import io
import json
import math
import struct
import time
from collections.abc import Collection
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from ddpm_jax.files import write_text

METRICS = "metrics.jsonl"
EVENTS = "events"


def to_pil(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A uint8 image of 1 or 3 channels as a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png_bytes(image: UInt8[np.ndarray, "H W C"]) -> bytes:
    """A uint8 image of 1 or 3 channels as a PNG file's content."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def grid(
    images: UInt8[np.ndarray, "N H W C"], *, columns: int | None = None, gap: int = 1
) -> UInt8[np.ndarray, "h w C"]:
    """Images side by side, row by row, with `gap` black pixels between; as square as their number allows by default."""
    N, H, W, C = images.shape
    columns = columns or int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    sheet = np.zeros((rows * (H + gap) - gap, columns * (W + gap) - gap, C), np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = image
    return sheet


def enlarge(image: UInt8[np.ndarray, "H W C"], *, smallest: int = 512) -> UInt8[np.ndarray, "h w C"]:
    """Repeats pixels until the image is at least about `smallest` pixels high, so that small images can be looked at."""
    factor = max(1, smallest // image.shape[0])
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, {"step": step, name: value, ...} each; without a last one that was cut short."""
    path = workdir / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def best_step(workdir: epath.Path, name: str, steps: Collection[int]) -> int | None:
    """The first of the steps at which the scalar of this name was least, or None if it was logged at none of them.

    Only lines that measured the same as its last one are compared: those of an equal "eval_of".
    """
    logged = [line for line in read_metrics(workdir) if math.isfinite(line.get(name, math.nan))]
    comparable = [line for line in logged if line.get("eval_of") == logged[-1].get("eval_of")]
    return min(((line[name], line["step"]) for line in comparable if line["step"] in steps), default=(0, None))[1]


def cut_metrics(path: epath.Path, last_step: int) -> None:
    """Removes the lines of metrics.jsonl beyond `last_step`, and a last line that was cut short."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]
    if kept != lines:
        write_text(path, "".join(kept))


def cut_events(directory: epath.Path, last_step: int) -> None:
    """Removes the TensorBoard events beyond `last_step`, and a last record that was cut short.

    An event file is a sequence of records: length (8 bytes), its checksum (4), an Event, its checksum (4).
    """
    if not directory.exists():
        return
    for path in directory.glob("events.out.tfevents.*"):
        content, kept, position = path.read_bytes(), [], 0
        while position + 12 <= len(content):
            length, checksum = struct.unpack_from("<QI", content, position)
            end = position + length + 16
            if checksum != masked_crc32c(content[position : position + 8]) or end > len(content):
                break
            if Event.FromString(content[position + 12 : end - 4]).step <= last_step:
                kept.append(content[position:end])
            position = end
        if sum(map(len, kept)) != len(content):
            temporary = directory / "cut.tmp"  # not with `tfevents` in its name: TensorBoard would read it
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)


class Report:
    """Writes a run's metrics and pictures into its workdir; what is there beyond `last_step` is cut first."""

    def __init__(self, workdir: epath.Path, *, last_step: int):
        self.workdir = workdir
        cut_metrics(workdir / METRICS, last_step)
        cut_events(workdir / EVENTS, last_step)
        (workdir / EVENTS).mkdir(parents=True, exist_ok=True)
        # The file's name has the second it is opened in, and last_step to tell apart two of a second. Not a SummaryWriter:
        # its flush does not wait for the thread that writes, so a kill after a checkpoint would lose events before it.
        self._events = EventsWriter(str(workdir / EVENTS / "events"), f".from_{last_step}")
        self._metrics = (workdir / METRICS).open("a")

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, {"step": step, **values}, and one TensorBoard scalar for each number among the values."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if not isinstance(value, str):
                self._event(step, summary.scalar(name, value))
        self._events.flush()

    def samples(self, step: int, images: UInt8[np.ndarray, "N H W C"]) -> None:
        """A grid of sampled images: samples/step_<step>.png and a TensorBoard picture."""
        sheet, path = enlarge(grid(images)), self._grid_path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_bytes(sheet))
        self._event(step, summary.image("samples", sheet, dataformats="HWC"))

    def has(self, name: str, step: int) -> bool:
        """Whether the scalar of this name was logged at a step."""
        return any(name in line for line in read_metrics(self.workdir) if line["step"] == step)

    def has_samples(self, step: int) -> bool:
        """Whether the grid of a step is there."""
        return self._grid_path(step).exists()

    def _grid_path(self, step: int) -> epath.Path:
        return self.workdir / "samples" / f"step_{step:08d}.png"

    def _event(self, step: int, content: Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))

    def flush(self) -> None:
        """Hands everything over to the file system."""
        self._metrics.flush()
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        self._metrics.close()
        self._events.close()
