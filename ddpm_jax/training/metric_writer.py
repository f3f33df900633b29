"""The logs of a run: metrics.jsonl, TensorBoard events and image grids. A resume truncates them to its step."""

import contextlib
import json
import math
import struct
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError
from google_crc32c import value as crc32c
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from ddpm_jax.core.files import read_bytes, write_bytes
from ddpm_jax.data.sheets import enlarge, grid, png_bytes

METRICS = "metrics.jsonl"
EVENTS = "events"
CHECKSUM = "crc32"  # the last entry of a line
MOST_LOG_BYTES = 2**34  # the events hold a long run's grids


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
    """The intact lines of a run's metrics.jsonl, {"step": step, name: value, ...} each."""
    parsed = (_parse_line(line) for line in _whole_lines(workdir / METRICS))
    return [values for values in parsed if values is not None]


def _whole_lines(path: epath.Path) -> list[bytes]:
    """The lines of a log, without an incomplete last one, and without the zeros that a system crash leaves."""
    content = read_bytes(path, most=MOST_LOG_BYTES) if path.exists() else b""
    return [line.lstrip(b"\0") for line in content.split(b"\n")[:-1]]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The values of a line, or None if it is damaged."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int or values["step"] < 0:
        return None
    checksum = values.pop(CHECKSUM, None)  # lines of earlier versions have none
    if checksum is not None and checksum != _checksum(values):
        return None
    return values if all(_is_scalar(value) for value in values.values()) else None


def _checksum(values: dict[str, Any]) -> int:
    """The CRC-32 of a line's values, which detects a flipped digit."""
    return zlib.crc32(json.dumps(values).encode())


def _is_scalar(value: Any) -> bool:
    return type(value) in (str, float) or (type(value) is int and abs(value) < 2**63)


def best_step(workdir: epath.Path, name: str, steps: Collection[int] | None = None) -> int | None:
    """The first of the steps at which a scalar was least, or None if it was logged at none of them. Default: all steps.

    Compares only lines whose "eval_of" equals that of the last line.
    """
    numbers = [line for line in read_metrics(workdir) if not isinstance(line.get(name, ""), str)]
    logged = [line for line in numbers if math.isfinite(line[name])]
    comparable = [line for line in logged if line.get("eval_of") == logged[-1].get("eval_of")]
    asked = [(line[name], line["step"]) for line in comparable if steps is None or line["step"] in steps]
    return min(asked, default=(0, None))[1]


def cut_metrics(path: epath.Path, last_step: int) -> int:
    """Truncates metrics.jsonl to `last_step`, and removes an incomplete last line and damaged lines; returns their number."""
    if not path.exists():
        return 0
    lines = [(line, _parse_line(line)) for line in _whole_lines(path)]
    kept = b"".join(line + b"\n" for line, values in lines if values is not None and values["step"] <= last_step)
    if kept != path.read_bytes():
        write_bytes(path, kept)
    return sum(values is None for _, values in lines)


def cut_events(directory: epath.Path, last_step: int) -> int:
    """Truncates the TensorBoard events to `last_step`, and removes damaged records; returns the number of the latter.

    An event file is a sequence of records: length (8 bytes), its checksum (4), an Event, its checksum (4). After a damaged
    length the next record cannot be found, so the file is cut there.
    """
    damaged = 0
    for path in directory.glob("events.out.tfevents.*") if directory.exists() else ():
        content, kept, position = read_bytes(path, most=MOST_LOG_BYTES), [], 0
        while position + 12 <= len(content):
            length, checksum = struct.unpack_from("<QI", content, position)
            if checksum != _masked_crc32c(content[position : position + 8]):
                damaged += 1
                break
            if (end := position + length + 16) > len(content):
                break
            step = _step_of_event(content[position + 12 : end])
            damaged += step is None
            if step is not None and step <= last_step:
                kept.append(content[position:end])
            position = end
        if sum(map(len, kept)) != len(content):
            temporary = directory / "cut.tmp"  # TensorBoard reads every file with `tfevents` in its name
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)
    return damaged


def _masked_crc32c(content: bytes) -> int:
    """The checksum in TensorBoard's records: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def _step_of_event(data: bytes) -> int | None:
    """The step of an Event, or None if it or the checksum after it is damaged."""
    if struct.unpack("<I", data[-4:]) != (_masked_crc32c(data[:-4]),):
        return None
    try:
        return Event.FromString(data[:-4]).step
    except DecodeError:
        return None


def write_scalars(folder: epath.Path, name: str, values: Mapping[int, float]) -> None:
    """Writes one scalar by step as TensorBoard events into a folder of their own, unless that is there."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    with contextlib.closing(EventsWriter(str(folder / "events"))) as events:
        for step, value in values.items():
            events.write_event(Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))


class MetricWriter:
    """Writes a run's metrics and grids into its workdir, after truncating its logs to `last_step`.

    say: receives one sentence for each log that was damaged.
    """

    def __init__(self, workdir: epath.Path, *, last_step: int, say: Callable[[str], None] = print):
        self.workdir = workdir
        for path, cut, what in ((METRICS, cut_metrics, "lines"), (EVENTS, cut_events, "records")):
            if damaged := cut(workdir / path, last_step):
                say(f"Note: {workdir / path} had {damaged} damaged {what}, which were removed; the others are kept.")
        (workdir / EVENTS).mkdir(parents=True, exist_ok=True)
        # The file's name holds the time in seconds, and last_step in case two are opened in one second. A SummaryWriter's
        # flush does not wait for its thread, so a kill after a checkpoint would lose events from before it.
        self._events = EventsWriter(str(workdir / EVENTS / "events"), f".from_{last_step}")
        self._metrics = (workdir / METRICS).open("a")

    def write(self, step: int, numbers: dict[str, Any], pictures: dict[str, np.ndarray] | None = None) -> None:
        """Writes a line of metrics.jsonl, {"step": step, **numbers, "crc32": checksum}, and the same to TensorBoard.

        numbers: scalars, and texts, which go to the line alone. pictures: images uint8 (N, H, W, C) by name, each written as
        a grid (data/sheets.py) to <name>/step_<step>.png and to TensorBoard.
        """
        for name, images in (pictures or {}).items():
            sheet, path = enlarge(grid(images)), self._grid_path(name, step)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, png_bytes(sheet))
            self._event(step, summary.image(name, sheet, dataformats="HWC"))
        if numbers:
            line = {"step": step, **numbers}
            self._metrics.write(json.dumps({**line, CHECKSUM: _checksum(line)}) + "\n")
            self._metrics.flush()
        for name, value in numbers.items():
            if not isinstance(value, str):
                self._event(step, summary.scalar(name, value))
        self._events.flush()

    def has(self, name: str, step: int) -> bool:
        """Whether a number or picture of this name was written at a step."""
        if self._grid_path(name, step).exists():
            return True
        return any(name in line for line in read_metrics(self.workdir) if line["step"] == step)

    def _grid_path(self, name: str, step: int) -> epath.Path:
        return self.workdir / name / f"step_{step:08d}.png"

    def _event(self, step: int, content: Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))

    def close(self) -> None:
        """Flushes and closes the files. Raises OSError if that fails, with the files closed."""
        with contextlib.closing(self._metrics):
            self._events.close()
