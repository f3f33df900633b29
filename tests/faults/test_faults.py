"""Damage to any file that the commands write is refused in one sentence or leaves no trace in the result: never silent.

DDPM_JAX_FAULTS=500 pytest -m slow tests/faults tries so many random damages, spread over the scenes.
"""

import collections
import random

import pytest
import scenes
from damages import DAMAGES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes by name, each made when first asked for."""
    known = {}

    def made(name):
        if name not in known:
            known[name] = scenes.make(name, tmp_path_factory.mktemp(name))
        return known[name]

    return made


def draws(made, name, count, seed):
    """Random damages of a scene: (file, damage, generator), every kind of damage equally often."""
    for i in range(count):
        generator = random.Random(f"{seed} {name} {i}")
        kinds = sorted(DAMAGES)
        yield generator.choice(made(name).files), kinds[i % len(kinds)], generator


def judge(made, name, count, seed, folder):
    verdicts, failures = collections.Counter(), []
    for i, (file, kind, generator) in enumerate(draws(made, name, count, seed)):
        try:
            verdicts[scenes.meet(made(name), file, DAMAGES[kind], generator, folder / f"{i}")] += 1
        except Exception as error:
            failures.append(f"{name}: {kind} of {file}: {type(error).__name__}: {error}")
    print(f"{name}: {count} damages, {dict(verdicts)}, {len(failures)} wrong")
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("name", ["train", "sample"])
def test_some_damages_are_never_silent(name, made, tmp_path):
    judge(made, name, 8, "some", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", scenes.SCENES)
def test_damages_are_never_silent(name, made, tmp_path):
    count = scenes.environment() or 96
    judge(made, name, -(-count // len(scenes.SCENES)), "all", tmp_path)
