"""The benchmark command of the version that PYTHONPATH names, one call at a time: python -P worker.py FOLDER WORD...

It runs `python -m ddpm_jax benchmark` of that version, and imports nothing of the one that this file belongs to. Every version
times what it measures by `benchmark.timing.take_turns(calls, repeats)`; in its place stands a function that waits for a line on
standard input before each call. Standard output has JSON alone: what version it is, once a program is compiled, and then the
seconds of each call.
"""

import importlib.util
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    """Runs the command up to its first program, and that as often as there are lines. The first word: the version's folder."""
    folder, *words = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the command prints is for people
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that a failure's reason comes last
    sys.argv = ["ddpm-jax", "benchmark", *words]
    found = importlib.util.find_spec("ddpm_jax")
    place = None if found is None else found.origin
    if Path(str(place)).resolve().parent.parent != Path(folder).resolve():
        sys.exit(f"Python imports {place}, which is not in {folder}")
    timing: Any = importlib.import_module("ddpm_jax.benchmark.timing")

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    def when_told(calls: Sequence[Callable[[], Any]], repeats: int) -> NoReturn:
        version = getattr(sys.modules["ddpm_jax"], "__version__", "unknown")
        answer({"version": version, "environment": timing.environment()})
        for _ in sys.stdin:
            start = time.perf_counter()
            calls[0]()  # any others are what the version compares itself with
            answer(time.perf_counter() - start)
        raise SystemExit  # the process that asked has what it needs, or is gone

    timing.take_turns = when_told
    runpy.run_module("ddpm_jax", run_name="__main__")


if __name__ == "__main__":
    main()
