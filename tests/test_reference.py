"""A run's loss beside a reference: bins, the interval that other runs lie in, and what is said of a run."""

import itertools

import numpy as np
import pytest
from tiny import tiny

from ddpm_jax.evaluation.reference import (
    RATIO,
    Curve,
    Reference,
    bin_means,
    edges_of,
    held_out_of,
    is_repeated,
    judge,
    losses_of,
    make_curve,
    say_verdict,
)

STEPS, EVERY = 400, 10


def log_of(losses, every=EVERY):
    """The lines that a run of these losses, one a step, writes into metrics.jsonl."""
    return [{"step": s, "loss": float(np.mean(losses[s - every : s]))} for s in range(every, len(losses) + 1, every)]


def draw_losses(seed, *, scatter=0.05, scale=1.0, shape=()):
    """Losses that fall as 1 / sqrt(step), with independent noise."""
    noise = np.random.default_rng(seed).normal(0, scatter, (*shape, STEPS))
    return scale * (1 + noise) / np.sqrt(1 + np.arange(STEPS) / 20)


# ---- Bins


def test_edges_are_logged_steps_in_a_constant_ratio_up_to_the_last():
    steps = list(range(10, 1001, 10))
    edges = edges_of(steps)
    assert edges[:8] == [0, 10, 20, 30, 40, 50, 60, 80]
    assert edges[-1] == 1000
    assert set(edges[1:]) <= set(steps)
    ratios = np.divide(edges[2:-1], edges[1:-2])
    assert (ratios >= RATIO).all()
    assert len(edges) < 35


@pytest.mark.parametrize("every", [1, 2, 5, 10])
def test_a_bins_mean_is_that_of_its_steps_however_often_was_logged(every):
    losses = draw_losses(0)
    edges = [0, 10, 40, 100, 400]
    expected = [losses[a:b].mean() for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(bin_means(losses_of(log_of(losses, every)), edges), expected, rtol=1e-12)


def test_a_bin_whose_edge_was_not_logged_has_no_mean():
    means = bin_means(losses_of(log_of(draw_losses(0), 20)), [0, 20, 50, 100, 400, 500])
    assert np.isnan(means).tolist() == [False, True, True, False, True]


# ---- The interval


def coverage(count, *, of):
    """The share of other runs' bins that lie in the interval of `count` runs; of: the number of trials."""
    inside = []
    for trial in range(of):
        runs = draw_losses(trial, shape=(count + 1,))
        low, high = make_curve([log_of(run) for run in runs[:-1]]).interval()
        means = bin_means(losses_of(log_of(runs[-1])), make_curve([log_of(runs[0])]).edges)
        known = np.isfinite(low)
        assert known.any()
        inside += ((low < means) & (means < high))[known].tolist()
    return np.mean(inside)


@pytest.mark.parametrize("count", [3, 5])
def test_99_of_100_other_runs_lie_in_the_interval_of_several(count):
    assert 0.98 < coverage(count, of=150) < 0.998


def test_99_of_100_other_runs_lie_in_the_interval_that_one_runs_log_gives():
    # A bin's own trend widens it, so it holds a few more than that.
    assert 0.98 < coverage(1, of=150) <= 1
    assert coverage(1, of=20) == pytest.approx(coverage(2, of=20), abs=0.03)


def test_the_interval_is_students_for_one_more_draw():
    curve = Curve(runs=4, edges=[0, 10, 20], loss=[2.0, 1.0], spread=[0.1, 0.3], freedom=[3, 0])
    low, high = curve.interval()
    reach = 5.840909 * 0.1 * np.sqrt(1 + 1 / 4)  # the 99.5 % point of Student's t with 3 degrees of freedom, by a table
    np.testing.assert_allclose([low[0], high[0]], [2 - reach, 2 + reach], rtol=1e-6)
    assert np.isnan(low[1])
    assert np.isnan(high[1])


# ---- What is said


@pytest.fixture(scope="module")
def reference():
    return Reference("mine", make_curve([log_of(draw_losses(seed)) for seed in range(5)]), {})


@pytest.mark.parametrize(("scale", "where"), [(1.0, "inside"), (1.5, "above"), (0.6, "below")])
def test_a_run_is_said_to_be_inside_above_or_below(scale, where, reference):
    log = log_of(draw_losses(9, scale=scale))
    found = judge(log, reference.curve)
    assert found.where == where
    assert found.steps == (reference.curve.edges[-2] + 1, STEPS)
    said = say_verdict(log, reference)
    assert f"over steps {found.steps[0]} to {STEPS}: {where} what is expected" in said
    assert "5 runs of results/mine have" in said
    assert "\n" not in said


def test_a_run_is_judged_by_the_last_bin_that_it_has_completed(reference):
    losses = draw_losses(9)
    edges = reference.curve.edges
    assert judge(log_of(losses[: edges[-1] - EVERY]), reference.curve).steps == (edges[-3] + 1, edges[-2])
    assert judge([], reference.curve) is None
    assert say_verdict([], reference) == ""


def test_a_run_that_was_trained_longer_is_judged_where_the_reference_ends(reference):
    log = [*log_of(draw_losses(9)), {"step": STEPS + EVERY, "loss": 0.1}]
    assert judge(log, reference.curve).steps[1] == STEPS


# ---- Which runs are compared


def test_only_the_seed_may_differ():
    assert is_repeated(tiny(), tiny(seed=5))
    assert is_repeated(tiny(), tiny(train={"steps": 80}))
    assert not is_repeated(tiny(), tiny(train={"lr": 2e-3}))
    assert not is_repeated(tiny(), tiny(model={"dropout": 0.0}))


def test_evaluations_are_taken_where_they_are_of_the_same_images_as_the_last():
    lines = [
        {"step": 10, "loss": 1.0},
        {"step": 10, "eval_loss": 3.0, "eval_loss_quarter_1": 4.0, "eval_of": "old"},
        {"step": 20, "eval_loss": 2.0, "eval_loss_quarter_1": 3.0, "eval_of": "new"},
        {"step": 30, "eval_loss": 1.0, "eval_loss_quarter_1": 2.0, "eval_of": "new"},
    ]
    expected = {"of": "new", "step": [20, 30], "eval_loss": [2.0, 1.0], "eval_loss_quarter_1": [3.0, 2.0]}
    assert held_out_of(lines) == expected
    assert held_out_of(lines[:1]) == {}
