"""Which parameters of a run are meant, in words, as --weights takes them.

ema          the moving average of train.ema_decay
raw          the parameters of the optimizer
ema:0.999    the moving average of another decay, one of train.ema_decays
width:0.15   the power-function average of a relative width (`posthoc`), rebuilt from the run's snapshots
"""

import re

from tyro.constructors import PrimitiveConstructorSpec

from ddpm_jax.config import WIDTH, TrainConfig
from ddpm_jax.core.errors import UsageError

EMA, WIDTHS = "ema:", "width:"


def canonical(weights: str) -> str:
    """The words in one spelling: ema:.9990 is ema:0.999. Raises UsageError for any others."""
    if weights in ("ema", "raw"):
        return weights
    kind, colon, number = weights.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = None
    if value is None or kind + colon not in (EMA, WIDTHS):
        raise UsageError(f"got weights {weights!r}, expected ema, raw, ema:DECAY or width:WIDTH, such as ema:0.999")
    if kind + colon == WIDTHS and (refusal := WIDTH.refusal(value)):
        raise UsageError(f"the width of weights {weights} {refusal}")
    return f"{kind}:{value}"


def width_of(weights: str) -> float | None:
    """The relative width of a power-function average; None for other weights."""
    return float(weights.removeprefix(WIDTHS)) if weights.startswith(WIDTHS) else None


def decay_of(weights: str, options: TrainConfig) -> float | None:
    """The decay of a moving average; None for other weights."""
    if weights == "ema":
        return options.ema_decay
    return float(weights.removeprefix(EMA)) if weights.startswith(EMA) else None


def tracked(options: TrainConfig) -> dict[str, float]:
    """The averages that a training state holds beside the EMA: the words, and the decay or width."""
    decays = {f"{EMA}{float(decay)}": float(decay) for decay in options.ema_decays}
    return decays | {f"{WIDTHS}{float(width)}": float(width) for width in options.ema_widths}


def check_tracked(weights: str, options: TrainConfig) -> None:
    """Raises UsageError unless a run with these options has, or can rebuild, such parameters."""
    if weights.startswith(EMA) and weights not in tracked(options):
        there = ["ema", *(name for name in tracked(options) if name.startswith(EMA))]
        raise UsageError(
            f"the run has no {weights}, but {', '.join(there)} (ema is of decay {options.ema_decay}); choose among these, or "
            "train with another train.ema_decays"
        )
    if weights.startswith(WIDTHS) and not options.ema_widths:
        raise UsageError(
            f"{weights} is rebuilt from snapshots, of which the run has none; train with --train.ema-widths 0.05 0.1"
        )


def file_part(weights: str) -> str:
    """The words as part of a file's name: ema-0.999."""
    return re.sub(r"[^\w.-]+", "-", weights)


WEIGHTS = PrimitiveConstructorSpec[str](
    nargs=1,
    metavar="{ema,raw,ema:DECAY,width:WIDTH}",
    instance_from_str=lambda words: canonical(words[0]),
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda weights: [weights],
)
