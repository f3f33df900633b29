"""The report of a run, report.html: config, training curve, results beside the paper's, and figures.

It is written from the workdir's files alone. It embeds its pictures and loads nothing from a network.
"""

import base64
import html
from typing import Any

from etils import epath

from ddpm_jax import config as configs
from ddpm_jax.core.files import DamagedFileError, read_json, remove_remnants, write_text
from ddpm_jax.evaluation.evaluation import EVALUATION
from ddpm_jax.evaluation.figures import FOLDER, curves
from ddpm_jax.evaluation.metrics import file_name, step_of, weights_of
from ddpm_jax.evaluation.paper import papers_numbers
from ddpm_jax.evaluation.parts import digest
from ddpm_jax.training import ema
from ddpm_jax.training.metric_writer import read_metrics
from ddpm_jax.training.workdir import read_config

REPORT = "report.html"

CAPTIONS = {
    "samples": "Samples.",
    "progressive": "Progressive generation (Figure 6): the x₀ predicted along the reverse process, a row for each sample.",
    "shared_latents": "Samples that share x_t with the first one (Figure 7): a row each for t = T, 3T/4, T/2, T/4.",
    "interpolation": "Between two real images (Figure 8): mixed at t = T/8, T/4, T/2, 3T/4, T, a row for each; first and last, "
    "the images themselves.",
    "nearest": "Samples (first column) and the real images nearest to them by pixels.",
    "nearest_features": "Samples (first column) and the real images nearest to them by features.",
}

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #8886; padding: .3rem .6rem; text-align: left; vertical-align: top; }
img { width: 100%; height: auto; background: #fff; }
img.pixels { image-rendering: pixelated; }
figure { margin: 1.5rem 0; }
small, figcaption { opacity: .75; }
"""


def describe(result: dict[str, Any]) -> str:
    """A result in one line: its numbers, their spread, and whether they can be compared with published ones."""
    metric = result["metric"]
    if metric == "prdc":
        return ", ".join(f"{name} {_number(result[name])}" for name in ("precision", "recall", "density", "coverage"))
    if metric == "nll":
        parts = ", ".join(f"{name} {part['value']:.5g}" for name, part in result["parts"].items())
        return f"{_number(result)} bits/dim ({parts})"
    if metric == "rate-distortion":
        return (
            f"rate {result['rate']:.4g}, distortion {result['distortion_bits']:.4g} bits/dim, "
            f"RMSE {result['rmse']:.4g} of 255"
        )
    if metric == "nearest":
        first = {name: min(row[0] for row in found["distances"]) for name, found in result["nearest"].items()}
        return ", ".join(f"least distance {distance:.4g} ({name})" for name, distance in first.items())
    return _number(result) + (f" ({result['not_comparable']})" if "not_comparable" in result else "")


def _number(estimate: dict[str, Any]) -> str:
    spreads = ("standard_error", "deviation_over_splits", "deviation_over_subsets")
    spread = next((estimate[name] for name in spreads if estimate.get(name) is not None), None)
    return f"{estimate['value']:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


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
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFileError(path, f"it holds no result of an evaluation: {error!r}") from None
    if proof is not None and not proven:
        raise DamagedFileError(path, "it is not what was written there")
    return result


def _show(result: dict[str, Any]) -> None:
    """Renders a result as the report does, to find out whether it can be rendered."""
    texts = [f"{step_of(result):,d}", describe(result), _made_of(result), result["metric"]]
    texts += [f"{name} {version}" for name, version in result["definition"]["software"].items()]
    _table([""], [texts])
    if result["metric"] == "rate-distortion":
        _rate_distortion([result])


def results_of_step(workdir: epath.Path, step: int, weights: str) -> list[tuple[str, str, str]]:
    """The results of a step and kind of parameters: the metric, its value in a line, and its provenance."""
    return [
        (result["metric"], describe(result), _made_of(result))
        for result in read_results(workdir)[0]
        if (step_of(result), weights_of(result)) == (step, weights)
    ]


def _ema_notes(config: configs.Config, results: list[dict[str, Any]]) -> list[str]:
    """A sentence for each step at which results are of an EMA that is of little use."""
    steps = sorted({step_of(result) for result in results if weights_of(result) == "ema"})
    return [f"Note: {note}." for step in steps if (note := ema.note(config.train, step))]


def _made_of(result: dict[str, Any]) -> str:
    definition, said = result["definition"], ["raw parameters"] if weights_of(result) == "raw" else []
    if sampling := definition.get("sampling"):
        said.append(
            f"{sampling['images']:,} samples, {sampling['sampler']}, {sampling['steps']} steps, seed {sampling['seed']}"
        )
    if bound := definition.get("bound"):
        said.append(f"{bound['terms']:,} of {bound['T'] - 1:,} terms between L_T and L_0, seed {bound['seed']}")
    if features := definition.get("features"):
        said.append(features)
    real = definition.get("reference") or definition.get("statistics")
    if real:
        said.append(f"{real['images']:,} images of {real['source']}" if "source" in real else real["statistics"])
    return "; ".join(said)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table of texts. Text after a line break in a cell is set small."""

    def cell(text: str) -> str:
        first, *rest = (html.escape(part) for part in text.split("\n"))
        return first + "".join(f"<br><small>{part}</small>" for part in rest)

    heads = "".join(f"<th>{cell(text)}</th>" for text in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _figure(content: bytes, kind: str, caption: str) -> str:
    data, style = base64.b64encode(content).decode(), ' class="pixels"' if kind == "png" else ""
    source = f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{data}"
    text = html.escape(caption)
    return f'<figure><img{style} src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _training_curve(workdir: epath.Path) -> str:
    lines = {}
    for name, label in (("loss", "training images"), ("eval_loss", "held-out images, EMA parameters")):
        logged = [line for line in read_metrics(workdir) if isinstance(line.get(name), float | int)]
        if logged:
            lines[label] = [line["step"] for line in logged], [line[name] for line in logged]
    return _figure(curves(lines, x="step", y="loss", log=True), "svg", "The training loss.") if lines else ""


def _fid_curve(workdir: epath.Path, results: list[dict[str, Any]]) -> str:
    """FID against steps, a line for each provenance with more than one step."""
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        if result["metric"] == "fid":
            lines.setdefault(_made_of(result), {})[step_of(result)] = result["value"]
    for line in read_metrics(workdir):
        if isinstance(line.get("eval_fid"), float | int):
            lines.setdefault(f"while training ({line.get('eval_of')})", {})[line["step"]] = line["eval_fid"]
    several = {name: (list(points), list(points.values())) for name, points in sorted(lines.items()) if len(points) > 1}
    return (
        _figure(curves(several, x="step", y="FID", marks=True), "svg", "FID against training steps.") if several else ""
    )


def _rate_distortion(results: list[dict[str, Any]]) -> str:
    if not results:
        return ""
    newest = max(results, key=step_of)
    rows = [[f"{row['reverse_time']}", f"{row['rate']:.5f}", f"{row['distortion']:.5f}"] for row in newest["table"]]
    T = newest["definition"]["bound"]["T"]
    columns = {
        "reverse time T - t": [T - row["t"] for row in newest["curve"]],
        "distortion (RMSE of 255)": [row["distortion"] for row in newest["curve"]],
        "rate (bits/dim)": [row["rate"] for row in newest["curve"]],
    }
    time, distortion, rate = columns
    figures = [
        _figure(curves({y: (columns[x], columns[y])}, x=x, y=y), "svg", f"{caption} (Figure 5).")
        for x, y, caption in (
            (time, distortion, "Distortion along the reverse process"),
            (time, rate, "Rate along the reverse process"),
            (rate, distortion, "Distortion against rate"),
        )
    ]
    of = f"<p><small>{html.escape(_made_of(newest))}</small></p>"
    return "<h2>Rate and distortion</h2>" + of + _table([time, rate, distortion], rows) + "".join(figures)


def _pictures(workdir: epath.Path) -> str:
    folder, said = workdir / EVALUATION / FOLDER, []
    for name, caption in CAPTIONS.items():
        for end, parameters in (("", ""), ("-raw", ", raw parameters")):
            paths = sorted(folder.glob(f"{name}-{'[0-9]' * 8}{end}.png")) if folder.exists() else []
            if paths:
                step = int(paths[-1].stem.removesuffix(end)[-8:])
                said.append(_figure(paths[-1].read_bytes(), "png", f"{caption} Step {step:,}{parameters}."))
    return "<h2>Figures</h2>" + "".join(said) if said else ""


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes report.html from the workdir's files, and returns its path."""
    workdir = epath.Path(workdir)
    config, (results, notes) = read_config(workdir), read_results(workdir)
    flat = configs.flatten(config)
    paper = papers_numbers(flat, config.data.source)
    head = ["metric", "step", *(["the paper's"] if paper else []), "value, and what it is of"]
    rows = [
        [
            result["metric"],
            f"{step_of(result):,}",
            *([paper.get(result["metric"], "")] if paper else []),
            f"{describe(result)}\n{_made_of(result)}",
        ]
        for result in results
    ]
    of_paper = "<p><small>The paper's numbers are Ho, Jain &amp; Abbeel 2020's own, not measured here.</small></p>"
    software = results[-1]["definition"]["software"] if results else {}
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(workdir.name)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(workdir.name)}</h1>"
        f"<h2>Results</h2>{_table(head, rows)}{of_paper if paper else ''}"
        + "".join(f"<p>{html.escape(note)}</p>" for note in _ema_notes(config, results))
        + "".join(f"<p><small>{html.escape(note)}</small></p>" for note in notes)
        + f"<h2>Training</h2>{_training_curve(workdir)}{_fid_curve(workdir, results)}"
        + _rate_distortion([result for result in results if result["metric"] == "rate-distortion"])
        + _pictures(workdir)
        + f"<h2>Config</h2>{_table(['field', 'value'], [[name, str(value)] for name, value in flat.items()])}"
        f"<p><small>{html.escape(', '.join(f'{name} {version}' for name, version in software.items()))}</small></p>"
        "</body></html>"
    )
    remove_remnants(workdir, REPORT)
    write_text(workdir / REPORT, page)
    return workdir / REPORT
