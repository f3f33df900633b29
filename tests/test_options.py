"""Options are known before JAX is imported: help and refusals come at once, with the names that the tables have."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_jax import config
from ddpm_jax.core.options import Choices
from ddpm_jax.evaluation import options as evaluation_options
from ddpm_jax.generation import options as generation_options

ROOT = Path(__file__).parent.parent
CHOICES = [
    value
    for module in (config, generation_options, evaluation_options)
    for value in vars(module).values()
    if isinstance(value, Choices)
]


def table_of(choices):
    module, name = choices.table.split(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("choices", CHOICES, ids=lambda choices: choices.table)
def test_stated_names_are_those_of_the_table(choices):
    assert choices.names == tuple(table_of(choices)) == choices.choices


def test_every_table_is_among_them():
    assert {choices.table.split(":")[1] for choices in CHOICES} == {
        "BETAS",
        "CONDITIONS",
        "LOSSES",
        "SAMPLERS",
        "SPACINGS",
        "METRICS",
    }


def test_an_entry_that_is_added_counts_and_one_of_a_module_not_imported_does_not(monkeypatch):
    for choices in CHOICES:
        module, table = sys.modules[choices.table.split(":")[0]], table_of(choices)
        monkeypatch.setitem(table, "mine", None)
        assert choices.choices == (*choices.names, "mine")
        assert choices.is_instance("mine")
        monkeypatch.delitem(sys.modules, module.__name__)
        assert choices.choices == choices.names
        assert choices.metavar == "{" + ",".join(choices.names) + "}"


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("train", ["--help"], 0),
        ("train", ["configs/digits.py", "--help"], 0),
        ("train", ["configs/digits.py", "--train.stesp", "3"], 2),
        ("train", ["configs/digist.py"], 2),
        ("sample", ["--help"], 0),
        ("sample", ["runs/digits", "--seed", "-1"], 2),
        ("evaluate", ["runs/digits", "--metrics", "fdi"], 2),
        ("benchmark", ["--help"], 0),
        ("convert", ["export", "--help"], 0),
        ("prepare_data", [], 2),
    ],
)
def test_help_and_refusals_come_before_jax_is_imported(name, words, code):
    script = f"""
import sys, time
sys.argv = ["{name}.py", *{words!r}]
from ddpm_jax.commands.cli import run
code = None
try:
    run("{name}")
except SystemExit as end:
    code = end.code
heavy = {{"jax", "flax", "scipy", "sklearn", "matplotlib", "tensorboardX", "torch"}} & set(sys.modules)
assert (code, heavy) == ({code}, set()), (code, heavy)
assert time.process_time() < 1.5, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
