"""Damage to any file that the commands write is refused in one sentence or leaves no trace in the result: never silent.

`python tests/faults/fuzz.py --count 500` tries more, on one device.
"""

import pytest
import scenes
from fuzz import judge


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Scenes by name, each made when first asked for."""
    known = {}

    def made(name):
        if name not in known:
            known[name] = scenes.make(name, tmp_path_factory.mktemp(name))
        return known[name]

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", scenes.SCENES)
def test_damages_are_never_silent(name, made, tmp_path):
    assert judge(made(name), name, range(8), "slow", tmp_path) == []
