"""Rows of figures as tables and pictures."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from measure import Row, finished
from plan import EVALUATIONS, GROUPS, SAMPLERS, Group

from ddpm_jax.config import Config
from ddpm_jax.core.files import read_text, write_bytes, write_text
from ddpm_jax.evaluation.figures import COLORS
from ddpm_jax.evaluation.results import plain, with_spread

JSON, README = "ablations.json", "README.md"
COLUMNS = {
    "bits_per_dim": "bits/dim",
    "rate": "rate",
    "L_0": "L_0",
    "frechet_distance": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
}
QUARTERS = tuple(f"loss_quarter_{i}" for i in range(1, 5))
BEGIN, END = "<!-- written by ablations.py -->", "<!-- end -->"


def values_of(rows: Sequence[Row], name: str) -> np.ndarray:
    """A figure of each run, float (runs,)."""
    return np.array([row["figures"][name] for row in rows])


def spread_of(values: np.ndarray) -> float:
    """The standard deviation between runs; 0 of a single one, which has none."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def mean_and_spread(values: np.ndarray) -> str:
    """The mean of runs ± their standard deviation."""
    return " ± ".join(text for text in with_spread(float(values.mean()), spread_of(values)) if text)


def of_group(group: Group, rows: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of a group's variants by their names there, as far as they are finished."""
    return {label: rows[key] for label, key in group.variants.items() if key in rows}


def table(runs: Mapping[str, Sequence[Row]]) -> str:
    """The Markdown table of a group: mean ± standard deviation over the seeds of what all its variants have."""
    common = [name for name in (*COLUMNS, *QUARTERS) if all(name in each[0]["figures"] for each in runs.values())]
    shown = [name for name in common if name in COLUMNS]
    heads = ["", *(COLUMNS[name] for name in shown), "network evaluations", "seeds"]
    if QUARTERS[0] in common:
        heads.insert(-2, "loss by quarter of t")
    lines = [heads, ["---"] * len(heads)]
    for label, rows in runs.items():
        cells = [label, *(mean_and_spread(values_of(rows, name)) for name in shown)]
        if QUARTERS[0] in common:
            cells.append(", ".join(plain(float(values_of(rows, name).mean())) for name in QUARTERS))
        lines.append([*cells, f"{rows[0]['evaluations']}", f"{len(rows)}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def insert(text: str, tables: str) -> str:
    """The text with the tables between their two marks, or at its end if it has none. The rest is written by hand."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] or "\n"
    return f"{before.rstrip()}\n\n{BEGIN}\n\n{tables.strip()}\n\n{END}{after}".lstrip()


def picture(name: str, runs: Mapping[str, Sequence[Row]]) -> bytes:
    """A PNG of a group: the seeds of each variant as dots, or the distance by the samplers' network evaluations."""
    from matplotlib.figure import Figure

    if name == "samplers":
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        draw_samplers(figure.subplots(), runs)
    else:
        figure = Figure(figsize=(7, 0.9 + 0.3 * len(runs)), layout="constrained")
        for axes, of in zip(figure.subplots(1, 2, sharey=True), ("bits_per_dim", "frechet_distance"), strict=True):
            draw_seeds(axes, runs, of)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def draw_seeds(axes: Any, runs: Mapping[str, Sequence[Row]], of: str) -> None:
    """A line for each variant: its seeds as dots, their mean as a bar."""
    for place, rows in enumerate(runs.values()):
        values = values_of(rows, of)
        axes.plot(values, np.full(len(values), place), "o", color=COLORS[0], alpha=0.6, markersize=5)
        axes.plot(values.mean(), place, "|", color=COLORS[1], markersize=14, markeredgewidth=2)
    axes.set(xlabel=f"{COLUMNS[of]} (less is better)", ylim=(len(runs) - 0.5, -0.5))
    axes.set_yticks(range(len(runs)), list(runs))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_samplers(axes: Any, runs: Mapping[str, Sequence[Row]]) -> None:
    """The mean distance of each sampler by its network evaluations; dashed: Algorithm 2."""
    from matplotlib import ticker

    of = "frechet_distance"
    for color, sampler in zip((*COLORS, "#666666"), SAMPLERS, strict=True):
        if points := [rows for label, rows in runs.items() if in_curve(label, sampler)]:
            values = [values_of(rows, of) for rows in points]
            axes.errorbar(
                [rows[0]["evaluations"] for rows in points],
                [each.mean() for each in values],
                [spread_of(each) for each in values],
                marker="o",
                markersize=4,
                color=color,
                label=sampler,
            )
    for rows in (runs[label] for label in runs if label.endswith(", all")):
        axes.axhline(values_of(rows, of).mean(), color="black", linestyle="--", linewidth=1, label="ancestral, all")
    axes.set(xlabel="network evaluations", ylabel=COLUMNS[of], xscale="log", yscale="log")
    axes.set_xticks(EVALUATIONS, [str(most) for most in EVALUATIONS])
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", frameon=False)


def in_curve(label: str, sampler: str) -> bool:
    """Whether a name of the samplers' group is of this sampler with few steps."""
    return label.startswith(f"{sampler}, ") and not label.endswith(", all")


def write_report(out: epath.Path, base: Config) -> None:
    """Writes the tables and pictures of all finished runs. A group is left out while one variant alone is finished."""
    rows, parts = finished(base), []
    out.mkdir(parents=True, exist_ok=True)
    for name, group in GROUPS.items():
        runs = of_group(group, rows)
        if len(runs) > 1:
            write_bytes(out / f"{name}.png", picture(name, runs))
            parts.append(f"### {group.title}\n\n{table(runs)}\n\n![{group.title}]({name}.png)")
    every = [row for key in rows for row in rows[key]]
    environments: list[dict[str, Any]] = []
    for row in every:
        if row["environment"] not in environments:
            environments.append(row["environment"])
    content = {
        "groups": {name: group._asdict() for name, group in GROUPS.items()},
        "environments": environments,
        "rows": [row | {"environment": environments.index(row["environment"])} for row in every],
    }
    write_text(out / JSON, json.dumps(content, indent=1) + "\n")
    text = read_text(out / README) if (out / README).exists() else ""
    write_text(out / README, insert(text, "\n\n".join(parts)))


def say_row(row: Row) -> str:
    """A finished run in a few words."""
    said = {**COLUMNS, "frechet_distance": "distance"}
    shown = ("bits_per_dim", "frechet_distance", "precision", "recall")
    numbers = ", ".join(f"{said[name]} {plain(row['figures'][name])}" for name in shown if name in row["figures"])
    return f"{numbers} ({row['seconds']['processor']:.0f} s)"
