"""The results of a workdir: read, checked and said in words, with as many digits as their spread allows."""

import dataclasses
import math
from typing import Any

from etils import epath

from ddpm_jax.core.files import DamagedFileError, digest, read_json
from ddpm_jax.evaluation.evaluation import EVALUATION
from ddpm_jax.evaluation.metrics import file_name, said_weights, step_of
from ddpm_jax.generation.options import SamplerOptions

SPREADS = ("standard_error", "deviation_over_splits", "deviation_over_subsets")
PRDC = ("precision", "recall", "density", "coverage")
DIGITS, MOST_DECIMALS = 4, 6  # of a number without a spread

# ---- Numbers


def plain(value: float, *, decimals: int | None = None) -> str:
    """A number without an exponent: 4 digits, or so many decimals. One that is rounded to nothing is "below 0.001", say."""
    if not math.isfinite(value):
        return f"{value}"
    if decimals is None:
        places = 0 if float(value).is_integer() else DIGITS - 1 - _magnitude(value)
        decimals = min(max(places, 0), MOST_DECIMALS)
    least = 10.0**-decimals
    if 0 < value < least / 2:
        return f"below {least:.{decimals}f}"
    return f"{value:z,.{decimals}f}"


def with_spread(value: float, spread: float | None) -> tuple[str, str]:
    """A number and its spread, "" if there is none. The spread has one digit, or two that start with 1; the number as many."""
    if not spread or not math.isfinite(spread) or not math.isfinite(value):
        return plain(value), ""
    place = _magnitude(spread)
    if place < -MOST_DECIMALS:
        return plain(value), ""
    decimals = max(0, (1 if spread < 2 * 10.0**place else 0) - place)
    return f"{value:z,.{decimals}f}", f"{spread:,.{decimals}f}"


def _magnitude(value: float) -> int:
    """The power of ten of a number's first digit."""
    return math.floor(math.log10(abs(value)))


def number_of(estimate: dict[str, Any]) -> tuple[str, str]:
    """An estimate's value and spread as texts (`with_spread`)."""
    spread = next((estimate[name] for name in SPREADS if estimate.get(name) is not None), None)
    return with_spread(estimate["value"], spread)


def _number(estimate: dict[str, Any]) -> str:
    return " ± ".join(text for text in number_of(estimate) if text)


# ---- Words


def describe(result: dict[str, Any]) -> str:
    """A result in one line: its numbers, their spread, and whether they can be compared with published ones."""
    metric = result["metric"]
    if metric == "prdc":
        return ", ".join(f"{name} {_number(result[name])}" for name in PRDC)
    if metric == "nll":
        value, spread = number_of(result)
        decimals = len(value.partition(".")[2])
        parts = ", ".join(f"{name} {plain(part['value'], decimals=decimals)}" for name, part in result["parts"].items())
        return f"{value}{f' ± {spread}' if spread else ''} bits/dim ({parts})"
    if metric == "ode-nll":
        return f"{_number(result)} bits/dim"
    if metric == "psnr":
        others = {"the condition": result.get("condition"), "the mean of samples": result.get("mean_of_samples")}
        said = ", ".join(f"{name} {_number(other)}" for name, other in others.items() if other)
        return f"{_number(result)} dB{f' ({said})' if said else ''}"
    if metric == "rate-distortion":
        rate, distortion, rmse = (plain(result[name]) for name in ("rate", "distortion_bits", "rmse"))
        return f"rate {rate}, distortion {distortion} bits/dim, RMSE {rmse} of 255"
    if metric == "nearest":
        first = {name: min(row[0] for row in found["distances"]) for name, found in result["nearest"].items()}
        return ", ".join(f"least distance {plain(distance)} ({name})" for name, distance in first.items())
    return _number(result) + (f" ({result['not_comparable']})" if "not_comparable" in result else "")


def made_of(result: dict[str, Any]) -> str:
    """What a result was computed from, in one line."""
    definition, said = result["definition"], said_weights(result)
    if sampling := definition.get("sampling"):
        said.append(f"{sampling['images']:,} samples, {sampled_by(sampling)}, seed {sampling['seed']}")
    if bound := definition.get("bound"):
        said.append(f"{bound['terms']:,} of {bound['T'] - 1:,} terms between L_T and L_0, seed {bound['seed']}")
    if flow := definition.get("flow"):
        said.append(f"steps of tolerance {flow['tolerance']:g}, seed {flow['seed']}")
    if features := definition.get("features"):
        said.append(features)
    real = definition.get("reference") or definition.get("statistics")
    if real:
        said.append(f"{real['images']:,} images of {real['source']}" if "source" in real else real["statistics"])
    return "; ".join(said)


def sampled_by(sampling: dict[str, Any]) -> str:
    """How samples were drawn, in a few words: the sampler, its steps, and what differs from the defaults."""
    steps = sampling["steps"]
    said = [sampling["sampler"], f"{' + '.join(map(str, steps)) if isinstance(steps, list) else steps} steps"]
    default = dataclasses.asdict(SamplerOptions())
    for name in [name for name in default if name not in ("sampler", "steps", "labels", "guide_with")]:
        value = sampling.get(name, default[name])
        if value != default[name]:
            said.append(f"{name.replace('_', ' ')} {value if isinstance(value, str | int | float) else list(value)}")
    if sampling.get("guide"):
        said.append(f"guided by the run {sampling['guide'][:8]}")
    if isinstance(sampling.get("labels"), list):
        said.append(f"labels {' '.join(sampling['labels'])}")
    return ", ".join(said)


def progressive_code(result: dict[str, Any]) -> tuple[list[list[str]], dict[str, list[float]]]:
    """Of a rate-distortion result: the table at tenths of the reverse process, and the curve's columns by name."""
    rows = [
        [f"{row['reverse_time']}", plain(row["rate"], decimals=4), plain(row["distortion"], decimals=2)]
        for row in result["table"]
    ]
    T, curve = result["definition"]["bound"]["T"], result["curve"]
    columns = {
        "reverse time T - t": [T - row["t"] for row in curve],
        "rate (bits/dim)": [float(row["rate"]) for row in curve],
        "distortion (RMSE of 255)": [float(row["distortion"]) for row in curve],
    }
    return rows, columns


# ---- Reading


def read_results(workdir: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of a workdir, ordered by metric and step, and a note for each damaged file."""
    folder, results, notes = workdir / EVALUATION, [], []
    for path in sorted(folder.glob("*.json")) if folder.exists() else []:
        try:
            results.append(_read_result(path))
        except DamagedFileError as error:
            notes.append(f"{path.name} is left out ({error.reason}); evaluate again, or move it away")
    return sorted(results, key=lambda result: (result["metric"], step_of(result))), notes


def _read_result(path: epath.Path) -> dict[str, Any]:
    """Reads a result. It must match its checksum, or, from an earlier version, be displayable. Raises DamagedFileError."""
    result = read_json(path)
    proof = result.pop("sha256", None)
    try:
        proven = proof is not None and proof == digest(result) and path.name == file_name(result)
        if proof is None:
            _show(result)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DamagedFileError(path, f"it holds no result of an evaluation: {error!r}") from None
    if proof is not None and not proven:
        raise DamagedFileError(path, "it is not what was written there")
    return result


def _show(result: dict[str, Any]) -> None:
    """Says a result as the report does, to find out whether it can be said."""
    texts = [f"{step_of(result):,d}", describe(result), made_of(result), result["metric"]]
    texts += [f"{name} {version}" for name, version in result["definition"]["software"].items()]
    for text in texts:
        text.encode()
    if result["metric"] == "rate-distortion":
        progressive_code(result)
