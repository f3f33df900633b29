"""Where the time of a program goes: a profile of one run, and its time by kernel and by part of the network.

FOLDER/NAME.xplane.pb.gz   the profile, which XProf and Perfetto read once it is unpacked
FOLDER/NAME.json           its summary
"""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from ddpm_jax.benchmark.parts import part_of
from ddpm_jax.core.errors import RunError

MOST_KERNELS = 30
LONGEST_NAME = 160  # of a kernel, in letters
# %fusion.3 = bf16[...] fusion(...), ..., metadata={op_name="jit(train_steps)/.../mid_attn_1/q/dot_general" ...}
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = .*\bmetadata=\{[^}]*\bop_name="(?P<place>[^"]*)"', re.MULTILINE
)


class Event(NamedTuple):
    """A run of a kernel or an instruction: its line (a stream or a thread), nanoseconds, and the HLO instruction, if told."""

    line: str
    name: str
    start: float
    duration: float
    op: str = ""


def record(call: Callable[[], Any], folder: str, name: str, text: str) -> None:
    """Profiles one more call, which must wait for its result, and writes the profile and its summary.

    folder, name: of the files. text: the compiled program's, which says where in the network each instruction comes from.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # only the devices' side is wanted
    with tempfile.TemporaryDirectory() as temporary:
        with jax.profiler.trace(temporary, profiler_options=options):
            call()
        files = sorted(Path(temporary).rglob("*.xplane.pb"))
        if not files:
            raise RunError(f"JAX's profiler wrote no profile of {name}; leave out --trace")
        content = files[0].read_bytes()
    summary = summarise(events(ProfileData.from_serialized_xspace(content)), places(text))
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{name}.xplane.pb.gz").write_bytes(gzip.compress(content))
    Path(folder, f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")


def events(profile: ProfileData) -> Iterator[Event]:
    """The work of the devices in a profile: streams of a GPU, XLA's operations of a TPU; on CPU what the host's threads run."""
    for plane in profile.planes:
        device = plane.name.startswith("/device:")
        for line in plane.lines:
            if device and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                op = dict(event.stats).get("hlo_op")
                if device or op:
                    where = f"{plane.name} {line.name}"
                    yield Event(where, event.name, event.start_ns, event.duration_ns, str(op or ""))


def places(text: str) -> dict[str, str]:
    """Where each instruction of a compiled program comes from: its name -> jit(train_steps)/.../conv_general_dilated."""
    return {match["name"]: match["place"] for match in _INSTRUCTION.finditer(text)}


def own_times(recorded: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Each event with its duration less that of the events inside of it, such as a loop's body."""
    by_line = defaultdict(list)
    for event in recorded:
        by_line[event.line].append(event)
    for line in by_line.values():
        opened: list[tuple[Event, float]] = []  # events with their own times, outermost first
        for event in sorted(line, key=lambda e: (e.start, -e.duration)):
            while opened and opened[-1][0].start + opened[-1][0].duration <= event.start:
                yield opened.pop()
            if opened:
                outer, own = opened.pop()
                opened.append((outer, own - event.duration))
            opened.append((event, event.duration))
        yield from opened


def summarise(recorded: Iterable[Event], origin: Mapping[str, str]) -> dict[str, Any]:
    """Milliseconds by kernel, MOST_KERNELS of them, and by part. origin: the place of each instruction (`places`).

    busy_ms: of all kernels; span_ms: from the first one's start to the last one's end. On one stream of a GPU their difference
    is the time in which it waits for the host.
    """
    recorded = list(recorded)
    if not recorded:
        return {"busy_ms": 0.0, "span_ms": 0.0, "events": 0, "kernels": [], "parts": []}
    kernels: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    for event, own in own_times(recorded):
        kernels[event.name[:LONGEST_NAME]].append(own / 1e6)
        place = origin.get(event.op)
        parts["unknown" if place is None else part_of(place)].append(own / 1e6)
    busy = sum(map(sum, kernels.values()))
    span = max(e.start + e.duration for e in recorded) - min(e.start for e in recorded)

    def ranked(times: dict[str, list[float]]) -> list[dict[str, Any]]:
        rows = [
            {"name": name, "count": len(own), "ms": sum(own), "share": sum(own) / busy} for name, own in times.items()
        ]
        return sorted(rows, key=lambda row: -row["ms"])

    return {
        "busy_ms": busy,
        "span_ms": span / 1e6,
        "events": len(recorded),
        "kernels": ranked(kernels)[:MOST_KERNELS],
        "parts": ranked(parts),
    }
