"""Whether a run is on track: its loss beside that of shipped runs of the same config on the same data.

A `Curve` is the mean loss in bins of steps, which are short at first and in a constant ratio later, with the interval that 99
of 100 runs are expected in. It is made of several runs that differ by their seeds, or of one run and the scatter of its log.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from scipy import stats
from tqdm import tqdm

from ddpm_jax.config import Config, ConfigError, fixed_fields, from_json
from ddpm_jax.core.files import DamagedFileError
from ddpm_jax.evaluation.results import plain
from ddpm_jax.training.loop import Findings
from ddpm_jax.training.metric_writer import read_metrics, write_scalars
from ddpm_jax.training.shipped import read_result, shipped_results

Lines = Sequence[dict[str, Any]]  # of metrics.jsonl
RATIO = 1.2  # of the ends of two bins that follow each other
SEVERAL = 3  # runs from which their own spread is taken
EXPECTED = 0.99  # of runs lie in the interval
QUARTERS = tuple(f"eval_loss_quarter_{i}" for i in range(1, 5))
HELD_OUT = ("eval_loss", *QUARTERS, "eval_bits_per_dim")


@dataclass(frozen=True)
class Curve:
    """The mean loss of runs in bins. Bin i has the steps edges[i] + 1 to edges[i + 1]; edges[0] is 0.

    spread: the standard deviation of one run's mean, and freedom: how many degrees of freedom it was estimated with; where
    that is 0 the spread is unknown, and 0.
    """

    runs: int
    edges: list[int]
    loss: list[float]
    spread: list[float]
    freedom: list[int]

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the greatest loss that another run is expected to have in each bin; NaN where that is unknown.

        The prediction interval of Student's t for one more draw from a normal distribution.
        """
        freedom, spread = np.array(self.freedom, np.float64), np.array(self.spread)
        known = freedom > 0
        factor = stats.t.ppf((1 + EXPECTED) / 2, np.where(known, freedom, 1)) * np.sqrt(1 + 1 / self.runs)
        reach = np.where(known, factor * spread, np.nan)
        return np.array(self.loss) - reach, np.array(self.loss) + reach


# ---- Making a curve


def losses_of(lines: Lines) -> dict[int, float]:
    """The logged training losses by step, each the mean of the steps since the line before."""
    return {line["step"]: line["loss"] for line in lines if isinstance(line.get("loss"), float)}


def edges_of(steps: Sequence[int]) -> list[int]:
    """The edges of bins, among logged steps in order: the first, then the next one RATIO times the last edge, and the last."""
    edges = [0]
    for step in steps:
        if step >= RATIO * edges[-1] or step == steps[-1]:
            edges.append(step)
    return edges


def bin_means(losses: dict[int, float], edges: Sequence[int]) -> np.ndarray:
    """The mean loss between each two edges, float (bins,); NaN where one of them was not logged."""
    steps = np.array([0, *losses])
    sums = np.cumsum([0.0, *np.diff(steps) * np.array([*losses.values()])])
    at = dict(zip(steps.tolist(), sums.tolist(), strict=True))
    return np.array([(at.get(b, np.nan) - at.get(a, np.nan)) / (b - a) for a, b in itertools.pairwise(edges)])


def make_curve(runs: Sequence[Lines]) -> Curve:
    """The curve of runs of one config.

    Args:
        runs: The lines of each run's metrics.jsonl.

    Returns:
        The `Curve`, up to the last step that all of them logged.
    """
    logged = [losses_of(lines) for lines in runs]
    edges = edges_of(sorted(set.intersection(*(set(losses) for losses in logged))))
    means = np.stack([bin_means(losses, edges) for losses in logged])  # (runs, bins)
    if len(runs) >= SEVERAL:
        spread, freedom = _between(means)
    else:
        spread, freedom = _scatter(logged, edges)
    return Curve(len(runs), edges, means.mean(axis=0).tolist(), spread.tolist(), freedom.tolist())


def _between(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The standard deviation between runs in each bin, and the degrees of freedom. means: (runs, bins).

    Few runs leave a bin's own deviation uncertain, so the squares of the relative ones are averaged with both neighbours'.
    """
    squares = (means.std(axis=0, ddof=1) / means.mean(axis=0)) ** 2
    near = [squares[max(0, i - 1) : i + 2] for i in range(len(squares))]
    spread = means.mean(axis=0) * np.sqrt([some.mean() for some in near])
    return spread, np.array([len(some) * (len(means) - 1) for some in near])


def _scatter(logged: Sequence[dict[int, float]], edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The standard error of a run's mean in each bin by the scatter of its log lines, and the degrees of freedom."""
    spread, freedom = [], []
    for a, b in itertools.pairwise(edges):
        within = [np.array([loss for step, loss in losses.items() if a < step <= b]) for losses in logged]
        free = sum(len(values) - 1 for values in within)
        squares = sum(((values - values.mean()) ** 2).sum() for values in within)
        count = sum(map(len, within)) / len(within)
        spread.append(float(np.sqrt(squares / free / count)) if free else 0.0)
        freedom.append(free)
    return np.array(spread), np.array(freedom)


def held_out_of(lines: Lines) -> dict[str, Any]:
    """The evaluations of a run while it trained, {"of": eval_of, "step": [...], name: [...]}, those that agree with the last."""
    evaluated = [line for line in lines if isinstance(line.get("eval_loss"), float)]
    if not evaluated:
        return {}
    of = evaluated[-1].get("eval_of")
    there = [line for line in evaluated if line.get("eval_of") == of]
    named = [name for name in HELD_OUT if all(name in line for line in there)]
    return {"of": of, "step": [line["step"] for line in there], **{n: [line[n] for line in there] for n in named}}


# ---- Comparing a run with one


class Reference(NamedTuple):
    """The result of a name, as far as a run is compared with it."""

    name: str
    curve: Curve
    held_out: dict[str, Any]


def find_reference(config: Config, data: dict[str, Any] | None) -> Reference | None:
    """The shipped result of the same config but for the seed, and of the same data set (its identity); None if there is none."""
    for name, folder in shipped_results().items():
        with contextlib.suppress(DamagedFileError, ConfigError):
            result = read_result(folder)
            if result["data"] == data and is_repeated(from_json(result["config"]), config):
                return Reference(name, Curve(**result["curve"]), result["held_out"])
    return None


def is_repeated(one: Config, other: Config) -> bool:
    """Whether two configs compute the same but for the seed."""
    return fixed_fields(one) == fixed_fields(dataclasses.replace(other, seed=one.seed))


class Verdict(NamedTuple):
    """A run's loss in the last bin that it has reached, and the reference's: its mean, and the interval of 99 of 100 runs."""

    steps: tuple[int, int]
    loss: float
    mean: float
    low: float
    high: float

    @property
    def where(self) -> str:
        """Where the loss lies: inside, above or below."""
        return "above" if self.loss > self.high else "below" if self.loss < self.low else "inside"


def judge(lines: Lines, curve: Curve) -> Verdict | None:
    """Compares a run's log with a curve. None before its first bin with a known spread is complete."""
    means, (low, high) = bin_means(losses_of(lines), curve.edges), curve.interval()
    reached = np.flatnonzero(np.isfinite(means) & np.isfinite(low))
    if not len(reached):
        return None
    i = int(reached[-1])
    steps = curve.edges[i] + 1, curve.edges[i + 1]
    return Verdict(steps, float(means[i]), curve.loss[i], float(low[i]), float(high[i]))


def say_verdict(lines: Lines, reference: Reference) -> str:
    """One sentence about a run's loss beside the reference's; "" before there is anything to say."""
    found, runs = judge(lines, reference.curve), reference.curve.runs
    if found is None:
        return ""
    of = f"{runs} runs of results/{reference.name} have" if runs > 1 else f"the run of results/{reference.name} has"
    first, last = found.steps
    return (
        f"Loss {plain(found.loss)} over steps {first:,} to {last:,}: {found.where} what is expected, "
        f"{plain(found.low)} to {plain(found.high)} ({of} {plain(found.mean)})."
    )


class Track:
    """An evaluator that says how the logged loss compares with a reference, at every checkpoint.

    It puts the reference's curve in WORKDIR/reference, which TensorBoard draws with the run's.
    """

    name, doing = "on_track", "comparing with the reference"

    def __init__(self, workdir: epath.Path, config: Config, reference: Reference):
        self.every = config.train.save_every
        self._workdir, self._reference = workdir, reference
        if jax.process_index() == 0:
            edges, losses = reference.curve.edges[1:], reference.curve.loss
            write_scalars(workdir / "reference", "loss", dict(zip(edges, losses, strict=True)))

    def __call__(self, state: Any) -> Findings:
        """Says it on process 0, and finds nothing for the log."""
        if jax.process_index() == 0 and (said := say_verdict(read_metrics(self._workdir), self._reference)):
            tqdm.write(said)
        return Findings({}, {})
