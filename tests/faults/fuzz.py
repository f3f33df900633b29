"""Random damages, judged: python tests/faults/fuzz.py --count 500 --seed 0 [--scenes train sample]"""

import argparse
import collections
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path


def judge(made, name, places, seed, folder):
    """Meets the damages of these places, every kind equally often; returns a text for each that was wrong."""
    import scenes
    from damages import DAMAGES

    verdicts, wrong, kinds = collections.Counter(), [], sorted(DAMAGES)
    for i in places:
        generator = random.Random(f"{seed} {name} {i}")
        kind, file = kinds[i % len(kinds)], generator.choice(made.files)
        try:
            verdicts[scenes.meet(made, file, DAMAGES[kind], generator, folder / f"{i}")] += 1
        except Exception as error:
            wrong.append(f"{name} {i}: {kind} of {file}: {type(error).__name__}: {error}")
            print(wrong[-1][:1500], flush=True)
    print(f"{name}: {len(places)} damages, {dict(verdicts)}, {len(wrong)} wrong", flush=True)
    return wrong


def main():
    """Spreads the damages over the scenes, and tells time and memory at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--scenes", nargs="*")
    arguments = parser.parse_args()
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parent.parent)]
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    import scenes

    wrong, start = [], time.perf_counter()
    names = arguments.scenes or list(scenes.SCENES)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        weights = {name: scenes.SCENES[name].weight for name in names}
        for name in names:
            count = -(-arguments.count * weights[name] // sum(weights.values()))
            made = scenes.make(name, Path(folder) / name)
            print(f"{name}: {len(made.files)} files", flush=True)
            wrong += judge(made, name, range(count), arguments.seed, Path(folder) / name)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(wrong)} wrong; {time.perf_counter() - start:.0f} s, at most {gigabytes:.2f} GB")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
