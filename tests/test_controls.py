"""The figures of real pictures that a result's are read beside, results/controls."""

import dataclasses
from pathlib import Path

import controls
import numpy as np
import pytest
from controls import Options

from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import open_source
from ddpm_jax.evaluation import scores
from ddpm_jax.evaluation.evaluation import real_places
from ddpm_jax.evaluation.features import flat_pixels

DIGITS = Options(str(Path(__file__).parent.parent / "results" / "digits"), num=300, queries=50)


def number(line, name):
    return float(line.split(f"{name} ")[1].split(",")[0])


def test_real_pictures_are_nearer_to_others_than_blurred_ones_and_these_than_noise():
    head, *sets, nearest = controls.controls(DIGITS)
    assert head == "pixels; 300 pictures of each set, compared with 300 training pictures"
    assert [line.split(":")[0] for line in sets] == [
        "other training pictures",
        "these blurred by 3 x 3",
        "uniform noise",
    ]
    others, blurred, noise = (number(line, "Fréchet distance") for line in sets)
    assert 0 < 3 * others < blurred < noise
    assert number(sets[2], "recall") == 0
    assert 0.5 < number(nearest, "least") <= number(nearest, "median") < 3


def test_the_sets_are_disjoint_and_the_first_is_the_evaluations():
    images = open_source(
        controls.from_json(controls.read_result(controls.epath.Path(DIGITS.result))["config"]).data
    ).images
    places = real_places(1797, 300)
    rest = np.setdiff1d(np.arange(1797), places)
    rest = rest[real_places(len(rest), 300)]
    mine = [scores.statistics(flat_pixels(np.asarray(images[some]))["features"]) for some in (places, rest)]
    line = list(controls.controls(DIGITS))[1]
    assert number(line, "Fréchet distance") == pytest.approx(scores.frechet_distance(*mine), rel=1e-3)


def test_a_test_set_takes_the_place_of_the_queries(tmp_path):
    np.save(tmp_path / "test.npy", np.zeros((300, 8, 8, 1), np.uint8))
    lines = list(controls.controls(dataclasses.replace(DIGITS, test=str(tmp_path / "test.npy"))))
    assert lines[1].startswith("test pictures: ")
    assert number(lines[-1], "least") == number(lines[-1], "median") > 3  # no digit is black


def test_a_folder_that_is_no_result_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no result\.json; give the folder of a result"):
        list(controls.controls(Options(str(tmp_path))))


def test_more_pictures_than_there_are_are_refused(tmp_path):
    np.save(tmp_path / "test.npy", np.zeros((40, 8, 8, 1), np.uint8))
    with pytest.raises(UsageError, match="--num 300 takes more than the 40 test pictures"):
        list(controls.controls(dataclasses.replace(DIGITS, test=str(tmp_path / "test.npy"))))
    with pytest.raises(UsageError, match="--num 899 takes 1798 of the 1797 training pictures; give at most 898"):
        list(controls.controls(dataclasses.replace(DIGITS, num=899)))
