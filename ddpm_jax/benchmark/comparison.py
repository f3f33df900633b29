"""The rule by which one version is slower than another: on ratios of neighbouring repeats, so that a slow phase affects both."""

import math
import statistics
from typing import NamedTuple

# Two processes of one version differ by some percent for as long as they live: by where their memory lies.
TOLERANCE = 0.05
CHANCE = 32  # of this many rows without a difference at most one lies above 1, whatever the noise is like
FEWEST = 5  # repeats: 2 ** -5 = 1 / 32


def rank(repeats: int) -> int:
    """The largest k for which the k-th smallest of that many values lies above their true median once in CHANCE or less.

    At least k of the values are then below the median with a probability that no distribution changes: they fall on either side
    like coins.
    """
    k = below = 0
    while (below + math.comb(repeats, k)) * CHANCE <= 2**repeats:
        below += math.comb(repeats, k)
        k += 1
    return k


class Comparison(NamedTuple):
    """Seconds of this version's repeats and of the other's, taken in turn."""

    this: list[float]
    other: list[float]

    @property
    def ratios(self) -> list[float]:
        """Each repeat of this version over the other's that followed it, in ascending order."""
        return sorted(a / b for a, b in zip(self.this, self.other, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the ratios: 1.1 where this version takes a tenth longer."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true median of the ratios lies, by their order alone."""
        k = rank(len(self.this))
        return self.ratios[k - 1], self.ratios[-k]

    @property
    def verdict(self) -> str:
        """Slower, faster or same: the first two if the whole interval is more than TOLERANCE away from 1."""
        low, high = self.interval
        if low > 1 + TOLERANCE:
            return "slower"
        return "faster" if high < 1 / (1 + TOLERANCE) else "same"
