"""The number of devices changes neither a draw nor, but for rounding, a loss."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import SMALLER, assert_metrics_agree, run
from tiny import experiment, tiny

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.training import step as training


@pytest.fixture(scope="module")
def one_device():
    return run(tiny(model=SMALLER), 50, dispatch=10)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8])
def test_losses_agree_on_any_number_of_devices(one_device, count):
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    _, metrics = run(tiny(model=SMALLER), 50, mesh=mesh, dispatch=10)
    assert_metrics_agree(metrics, one_device[1])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_draws_are_identical_on_any_number_of_devices(count):
    config, shape = tiny(), (16, 8, 8, 1)
    split = sharding.split(sharding.make_mesh(devices=jax.devices()[:count]))
    draw = jax.jit(lambda step: training.draw(experiment(config), step, shape, None), out_shardings=split)
    for step in (0, 7):
        here, there = draw(jnp.int32(step)), training.draw(experiment(config), jnp.int32(step), shape, None)
        assert here.eps.sharding.num_devices == count
        here, there = (d._replace(dropout_keys=jax.random.key_data(d.dropout_keys)) for d in (here, there))
        for a, b in zip(here, there, strict=True):
            np.testing.assert_array_equal(a, b)


# ---- The same command and data on all processes

FIRST = {"train.lr": 0.1, "model.ch_mult": (1, 2), "data": {"images": 3, "sha256": "ab"}}


def check_beside_first(monkeypatch, ours, *, another=False):
    """`check_same` on a second process, beside a first one with FIRST. another: whether a third process differs."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(sharding, "first_gives", lambda give: json.dumps(FIRST).encode())
    monkeypatch.setattr(sharding, "any_process", lambda flag: flag or another)
    sharding.check_same(ours)


def test_the_same_facts_on_all_processes_pass(monkeypatch):
    check_beside_first(monkeypatch, FIRST)


def test_other_facts_than_the_first_process_has_are_told(monkeypatch):
    ours = {"train.lr": 0.2, "model.ch_mult": (1, 2), "data": {"images": 3, "tfds": "x"}}
    with pytest.raises(UsageError) as raised:
        check_beside_first(monkeypatch, ours)
    assert str(raised.value) == (
        "this process differs from process 0 in train.lr (there 0.1, here 0.2), data.sha256 (there 'ab', here nothing), "
        "data.tfds (there nothing, here 'x'); start the same command with the same data on each"
    )


def test_a_process_stops_where_another_one_differs(monkeypatch):
    with pytest.raises(UsageError, match="another process differs from the first one; its message says in what"):
        check_beside_first(monkeypatch, FIRST, another=True)
