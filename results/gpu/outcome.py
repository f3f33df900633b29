"""What came of the tasks: their rows, profiles, curves and distances, in one file and as tables."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import REPEATS, Task

COLUMNS = {
    "task": ("task", ""),
    "what": ("what", ""),
    "device_gib": ("GiB", "d"),
    "batch": ("batch", "d"),
    "dtype": ("dtype", ""),
    "compile_s": ("compile s", ".0f"),
    "ms_each": ("ms each", ".2f"),
    "spread": ("spread", ".1%"),
    "images_per_s": ("images/s", ".1f"),
    "peak_share": ("of peak", ".1%"),
    "ratio_to_peer": ("time / peer's", ".2f"),
    "memory_mib": ("MiB", ".0f"),
}


def rows(tasks: Sequence[Task], out: Path) -> list[dict[str, Any]]:
    """The measurements' rows, each with its task; of one that was cut those that it had written."""
    found = []
    for task in tasks:
        files = [path for path in (out / f"{task.name}.json", out / f"{task.name}.new.json") if path.exists()]
        for row in json.loads(files[0].read_text())["rows"] if files else ():
            found.append({"task": task.name} | row)
    return found


def curve(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics.jsonl that are whole."""
    path, lines = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # the training was killed while it wrote it
    return lines


def differing(out: Path, flags: str) -> str:
    """From which step on two trainings with the same flags differ in a logged loss or gradient; empty without both."""
    both = [curve(out / "repeats" / f"{flags}_{i}") for i in (1, 2)]
    numbers = [{line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line} for lines in both]
    if not all(numbers):
        return ""
    apart = [step for step, values in numbers[0].items() if numbers[1].get(step) != values]
    return f"from step {min(apart)}" if apart else f"in none of {max(numbers[0])} steps"


def collect(tasks: Sequence[Task], states: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """All results: the content of OUT/summary.json. states: how each task ended (`gpu.Status.tasks`)."""
    workdir = out / "cifar10"
    traces = {path.stem: json.loads(path.read_text()) for path in sorted((out / "trace").glob("*.json"))}
    return {
        "tasks": states,
        "rows": rows(tasks, out),
        "traces": traces,
        "repeats_differ": {flags: differing(out, flags) for flags in REPEATS},
        "curve": curve(workdir),
        "evaluations": [json.loads(path.read_text()) for path in sorted((workdir / "evaluation").glob("*.json"))],
    }


def tell(found: dict[str, Any]) -> None:
    """Prints the results as tables."""
    from ddpm_jax.benchmark.timing import table  # imports JAX

    headings = {name: (name, ".0f" if name == "seconds" else "") for name in ("task", "state", "seconds", "why")}
    print("\n" + table([{"task": name} | entry for name, entry in found["tasks"].items()], headings))
    if found["rows"]:
        print("\n" + table(found["rows"], COLUMNS))
    for name, trace in found["traces"].items():
        parts = ", ".join(f"{part['name']} {part['share']:.0%}" for part in trace["parts"][:6])
        print(f"\n{name}: busy {trace['busy_ms']:.1f} of {trace['span_ms']:.1f} ms; {parts}")
    for flags, where in found["repeats_differ"].items():
        if where:
            print(f"\nTwo trainings ({flags}) differ {where}.")
    lines = [[line for line in found["curve"] if name in line][-1:] for name in ("loss", "eval_loss")]
    for line in itertools.chain(*lines):
        told = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "crc32"}
        print("\n" + ", ".join(f"{name} {value:.6g}" for name, value in told.items()))
    for result in found["evaluations"]:
        print(f"{result['metric']} {result['value']:.6g} at step {result['definition']['sampling']['step']}")
