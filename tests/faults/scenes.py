"""Scenes for faults: folders that the commands have written, the command that meets the damage, and what must come out of it.

A scene is made once, copied for each damage, and its command run on the copy. Its answer must be one sentence and exit code 1
or 2, or exactly what the undamaged scene gives. A new kind of file joins by being written in a scene; a new command is a new one.
"""

import contextlib
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image
from tiny import tiny

from ddpm_jax.commands import cli
from ddpm_jax.training.checkpoint import find_damage, manifest_digest
from ddpm_jax.training.workdir import load_run

CONFIG = tiny(
    data={"channels": 3},
    model={"ch_mult": (1,), "attn_resolutions": (8,), "ch": 4, "groups": 2, "dropout": 0.0},
    diffusion={"T": 5},
    train={"steps": 8, "batch_size": 8, "save_every": 2, "log_every": 2, "sample_every": 4, "num_samples": 2},
)
SAMPLE = ["--num-images", "24", "--batch-size", "8"]  # three batches, also on eight devices
EVALUATE = ["--features", "pixels", "--num-images", "8", "--batch-size", "4", "--bootstrap", "2"]


@dataclass(frozen=True)
class Scene:
    """prepare(folder) writes everything; command(folder) is what meets the damage; result(folder) is what must be the same.

    damaged: the folders, relative to the scene's, whose files are damaged. weight: its share of a fuzz; training takes long.
    """

    prepare: Callable[[Path], None]
    command: Callable[[Path], list]
    result: Callable[[Path], Any]
    damaged: tuple[str, ...]
    weight: int = 4


def run(folder, name, *arguments):
    """A command with caches of the folder's own: (exit code, what it said)."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        patch.setenv("DDPM_JAX_CACHE", str(folder / "cache"))
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)
        patch.chdir(folder)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                cli.run(name)
                code = 0
            except SystemExit as end:
                code = end.code
    return code, said.getvalue()


def must(folder, name, *arguments):
    """As `run`, of a command that must succeed."""
    code, said = run(folder, name, *arguments)
    assert code == 0, said
    return said


def digest(tree):
    """SHA-256 of arrays."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def pictures(folder, bad=False):
    """24 pictures, and the config of a run on them."""
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    for i in range(24):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"pictures/{i:02d}.png")
    if bad:
        (folder / "pictures/99.png").write_bytes(b"no picture")
    (folder / "config.py").write_text(f"from ddpm_jax.config import *\nconfig = {CONFIG!r}\n")


def training(folder, steps, *options):
    """The command line of a run on the pictures."""
    source = ["--data.source", "pictures", "--train.steps", str(steps)]
    return ["train", "config.py", "--workdir", "run", *source, *options]


def trained(folder, steps, *options):
    must(folder, *training(folder, steps, *options))


def state(folder):
    """The final parameters and EMA."""
    return [(run.step, digest(run.params)) for run in (load_run(folder / "run", weights=w) for w in ("raw", "ema"))]


def half_a_run(folder):
    pictures(folder)
    trained(folder, 4)


def half_a_run_without_the_bad(folder):
    pictures(folder, bad=True)
    code, _ = run(folder, "prepare_data", "pictures", "--check")
    assert code == 1
    trained(folder, 4, "--data.on-bad-image", "skip")


def a_set(folder):
    pictures(folder)
    trained(folder, 2)
    must(folder, "sample", "run", *SAMPLE, "--out", "out")


def half_a_set(folder):
    from ddpm_jax.generation import image_set

    pictures(folder)
    trained(folder, 2)
    with pytest.MonkeyPatch.context() as patch:
        add, added = image_set.ImageSet.add, []

        def killed(self, part, images):
            if len(added) == 2:
                self.wait()
                raise OSError(5, "the power is gone")
            added.append(part)
            add(self, part, images)

        patch.setattr(image_set.ImageSet, "add", killed)
        code, said = run(folder, "sample", "run", *SAMPLE, "--out", "out")
    assert code == 1, said


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def images(folder):
    """Every image of the set, from the .npz and from the PNGs."""
    with np.load(folder / "out/images.npz") as file:
        arrays = file["images"]
    singles = np.stack([picture(folder / f"out/{i:06d}.png") for i in range(24)])
    np.testing.assert_array_equal(arrays, singles)
    assert picture(folder / "out/grid.png").size > 0
    return hashlib.sha256(arrays.tobytes()).hexdigest()


def an_evaluation(folder):
    pictures(folder)
    trained(folder, 2)
    must(folder, "evaluate", "run", *EVALUATE)


def numbers(folder):
    """The results of the evaluation."""
    assert (folder / "run/report.html").stat().st_size > 10_000
    found = {}
    for path in sorted((folder / "run/evaluation").glob("*.json")):
        with contextlib.suppress(ValueError):
            result = json.loads(path.read_text())
            if isinstance(result, dict) and "metric" in result:
                found[result["metric"]] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def a_model(folder):
    pictures(folder)
    trained(folder, 2)
    must(folder, "convert", "to-diffusers", "run", "model")


SCENES = {
    "train": Scene(half_a_run, lambda f: training(f, 8), state, ("run", "cache"), weight=1),
    "train-without-bad": Scene(
        half_a_run_without_the_bad,
        lambda f: training(f, 8, "--data.on-bad-image", "skip"),
        state,
        ("cache/bad", "run"),
        weight=1,
    ),
    "sample": Scene(a_set, lambda f: ["sample", "run", *SAMPLE, "--out", "out"], images, ("out", "run/checkpoints")),
    "sample-half": Scene(half_a_set, lambda f: ["sample", "run", *SAMPLE, "--out", "out"], images, ("out",)),
    "evaluate": Scene(
        an_evaluation, lambda f: ["evaluate", "run", *EVALUATE], numbers, ("run/evaluation", "run", "cache")
    ),
    "convert": Scene(
        a_model,
        lambda f: ["convert", "from-diffusers", "model", "imported"],
        lambda f: digest(load_run(f / "imported").params),
        ("model",),
    ),
}


@dataclass(frozen=True)
class Made:
    """A scene on disk, with what its command gives where nothing is damaged."""

    scene: Scene
    folder: Path
    expected: Any
    files: list[str]


def make(name, folder):
    """Makes a scene and runs its command on an undamaged copy."""
    scene = SCENES[name]
    scene.prepare(folder / "scene")
    shutil.copytree(folder / "scene", folder / "sound")
    must(folder / "sound", *scene.command(folder / "sound"))
    found = []
    for place in scene.damaged:
        top = folder / "scene" / place
        found += [str(p.relative_to(folder / "scene")) for p in sorted(top.rglob("*")) if p.is_file()]
    files = [f for f in dict.fromkeys(found) if not f.startswith("cache/compiled") and not f.endswith("lock")]
    return Made(scene, folder, scene.result(folder / "sound"), files)


def kept(folder):
    """The proofs of every checkpoint that is intact, by step."""
    steps = [path for path in epath.Path(folder / "run/checkpoints").iterdir() if path.name.isdecimal()]
    return {step.name: manifest_digest(step) for step in steps if find_damage(step) is None}


def meet(made, file, damage, random, folder):
    """Damages one file of a copy, runs the command, and judges: "refused" or "same", else AssertionError."""
    shutil.copytree(made.folder / "scene", folder)
    path = folder / file
    other = (folder / random.choice(made.files)).read_bytes()
    before = path.read_bytes()
    content = damage(before, random, other)
    if content is None:
        path.unlink()
    elif content != before:
        path.write_bytes(content)
    intact = kept(folder)
    start = time.process_time()  # of the processor: other work on the machine does not count
    code, said = run(folder, *made.scene.command(folder))
    seconds = time.process_time() - start
    assert "Traceback" not in said, said
    assert seconds < 30, seconds
    after = kept(folder)
    assert all(after.get(step, proof) == proof for step, proof in intact.items())
    if code == 0:
        assert made.scene.result(folder) == made.expected, f"silent: {said}"
        verdict = "same"
    else:
        assert code in (1, 2), (code, said)
        last = said.strip().splitlines()[-1]
        assert last.startswith(tuple(f"{name}.py: " for name in cli.COMMANDS)), said
        assert len(last) < 2000
        assert intact.keys() <= after.keys(), "a checkpoint that was intact is gone"
        verdict = "refused"
    shutil.rmtree(folder, ignore_errors=True)
    return verdict
