"""The report of a run, report.html: samples, four numbers, all results beside the paper's, curves, figures, config.

It is written from the workdir's files alone. It embeds its pictures, loads nothing from a network and has no script.
"""

import base64
import datetime
import html
import inspect
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ddpm_jax.config import Config, flatten
from ddpm_jax.core.files import remove_remnants, write_text
from ddpm_jax.data.sheets import description_of
from ddpm_jax.evaluation.evaluation import EVALUATION
from ddpm_jax.evaluation.figures import COLUMNS, FOLDER, curves
from ddpm_jax.evaluation.metrics import DESCRIPTIONS, METRICS, said_weights, step_of, weights_of
from ddpm_jax.evaluation.paper import papers_numbers
from ddpm_jax.evaluation.reference import QUARTERS, Reference, find_reference, say_verdict
from ddpm_jax.evaluation.results import (
    PRDC,
    describe,
    made_of,
    number_of,
    plain,
    progressive_code,
    read_results,
    sampled_by,
)
from ddpm_jax.training import ema
from ddpm_jax.training.metric_writer import read_metrics
from ddpm_jax.training.workdir import data_of, read_config

REPORT = "report.html"
# The first four that were computed are shown.
HEADLINES = ("fid", "is", "nll", "precision", "recall", "kid", "losses", "coverage", "density")
STRIP_ROWS = 2  # of samples, until a click shows the others
PIXELATED = 32  # larger images are smoothed where the page enlarges them

CAPTIONS = {
    "progressive": "Progressive generation (Figure 6): the x₀ predicted along the reverse process, a row for each sample.",
    "shared_latents": "Samples that share x_t with the first one (Figure 7): a row each for t = T, 3T/4, T/2, T/4.",
    "interpolation": "Between two real images (Figure 8): mixed at t = T/8, T/4, T/2, 3T/4, T, a row for each; first and last, "
    "the images themselves.",
    "nearest": "Samples (first column) and the real images nearest to them by pixels.",
    "nearest_features": "Samples (first column) and the real images nearest to them by features.",
}

STYLE = """
:root { color-scheme: light dark; --line: #8885; }
* { box-sizing: border-box; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; break-after: avoid; }
p { margin: .4rem 0; }
small, figcaption, header p, .card p { font-size: .875rem; font-weight: 400; opacity: .8; }
figure { margin: 0; break-inside: avoid; }
img { display: block; width: 100%; height: auto; }
.pixels { image-rendering: pixelated; }
.strip { margin: 1rem 0; }
.strip img { object-fit: cover; object-position: top; border-radius: 6px; }
.strip img.whole { width: auto; max-width: 100%; max-height: 22rem; min-height: 8rem; }
.strip[open] img { aspect-ratio: auto !important; }
summary { cursor: pointer; }
.strip summary { list-style: none; }
.strip summary::-webkit-details-marker { display: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; break-inside: avoid; }
.card dt { font-weight: 600; }
.card dd { margin: 0; }
.card strong { font-size: 1.6rem; line-height: 1.3; }
.card span { white-space: nowrap; }
.pair { display: grid; gap: 1.5rem; }
@media (min-width: 40rem), print { .pair { grid-template-columns: 1fr 1fr; } }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem .35rem 0; text-align: left; vertical-align: top; }
td:last-child { overflow-wrap: anywhere; }
tbody th { font-weight: 500; }
body > details:not(.strip) { border-top: 1px solid var(--line); padding: .6rem 0; }
body > details:not(.strip) > summary { font-weight: 600; }
@media screen and (prefers-color-scheme: dark) { .curve { filter: invert(1) hue-rotate(180deg); } }
@media print { :root { color-scheme: light; font-size: 75%; } body { padding: 0; max-width: none; } }
"""


def _text(text: str) -> str:
    """A text as HTML; what follows a line break is set small."""
    first, *rest = (html.escape(part) for part in text.split("\n"))
    return first + "".join(f"<br><small>{part}</small>" for part in rest)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table of texts, each row headed by its first."""
    heads = "".join(f'<th scope="col">{_text(text)}</th>' for text in head)
    lines = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _pair(figures: list[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def _image(content: bytes, kind: str, alt: str, *, classes: str, style: str = "") -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    styled = f' style="{style}"' if style else ""
    return f'<img class="{classes}"{styled} src="{source}" alt="{html.escape(alt)}">'


def _curve(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], caption: str, **options: Any) -> str:
    """A figure of curves; its alternative text tells where each line starts and ends."""
    ends = [
        f"{name}: {plain(ys[0])} at {xs[0]:,}, {plain(ys[-1])} at {xs[-1]:,}"
        for name, (xs, ys) in lines.items()
        if len(xs)
    ]
    image = _image(curves(lines, **options), "svg+xml", f"{caption} {'; '.join(ends)}.", classes="curve")
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


# ---- The parts of the page, from top to bottom


def _title(workdir: epath.Path, config: Config, step: int) -> tuple[str, str]:
    """The data set's name, and a line that names the run, its config, the step and today."""
    data, diffusion, today = config.data, config.diffusion, datetime.date.today()
    name = data.source if data.source.startswith("tfds:") else epath.Path(data.source).name
    of = f" of {config.train.steps:,}" if step <= config.train.steps else ""
    height, width = data.size
    channels = {1: "grey", 3: "RGB"}.get(data.channels, f"{data.channels} channels")
    floats = f", float32 in [{plain(data.value_range[0])}, {plain(data.value_range[1])}]" if data.value_range else ""
    facts = (
        f"{height}\u00d7{width} {channels}{floats}",
        f"run {workdir.name}",
        f"T = {diffusion.T:,}, {diffusion.schedule} schedule, predicts {diffusion.prediction}, loss {diffusion.loss}",
        f"batch {config.train.batch_size:,}",
        f"step {step:,}{of}",
        f"{today.day} {today:%B %Y}",
    )
    return name, " · ".join(facts)


def _newest(folder: epath.Path, name: str, end: str = "") -> tuple[int, epath.Path] | None:
    """The picture NAME, 8 digits, END of the greatest step, and that step."""
    paths = sorted(folder.glob(f"{name}{'[0-9]' * 8}{end}.png")) if folder.exists() else []
    return (int(paths[-1].stem.removesuffix(end)[-8:]), paths[-1]) if paths else None


def _better(config: Config, step: int) -> str:
    """The parameters that are looked at first: the EMA, or the raw ones while it is of little use."""
    return "raw" if ema.note(config.train, step) else "ema"


def _samples(workdir: epath.Path, config: Config) -> tuple[str, epath.Path, bool] | None:
    """Samples of the newest step: what they are, their picture, and whether it is an evaluation's, in rows of COLUMNS.

    Of one step the better parameters' come first; the training's grid, which shows both while the EMA is of little use, second.
    """
    folder, found = workdir / EVALUATION / FOLDER, []
    for weights, picture in (
        ("ema", _newest(folder, "samples-")),
        ("raw", _newest(folder, "samples-", "-raw")),
        ("", _newest(workdir / "samples", "step_")),
    ):
        if picture:
            step, path = picture
            better = _better(config, step)
            both = "EMA (left) and raw parameters (right)" if better == "raw" else ""
            of = {"ema": "", "raw": "raw parameters", "": both}[weights]
            said = f"Samples of step {step:,}" + (f", {of}" if of else "")
            found.append(((step, 2 if weights == better else 0 if weights else 1), said, path, bool(weights)))
    return max(found, key=lambda one: one[0])[1:] if found else None


def _pixelated(config: Config) -> str:
    """The class of images that are small enough to show their pixels."""
    return "pixels" if max(config.data.size) <= PIXELATED else ""


def _strip(workdir: epath.Path, config: Config) -> str:
    """The first rows of samples; a click shows all. A training's grid is shown whole."""
    found = _samples(workdir, config)
    if found is None:
        return ""
    alt, path, in_rows = found
    content, (down, across) = path.read_bytes(), config.data.size
    if drawn := description_of(content):
        alt = f"{alt}, {drawn}"
    width, height = struct.unpack(">II", content[16:24].ljust(8, b"\0"))  # of a PNG
    scale = width // (COLUMNS * (across + 1) - 1)
    top = scale * (STRIP_ROWS * (down + 1) - 1)
    pixels = _pixelated(config)
    if not in_rows or height <= top:
        image = _image(content, "png", alt, classes=f"whole {pixels}")
        return f'<figure class="strip">{image}<figcaption>{html.escape(alt)}.</figcaption></figure>'
    image = _image(content, "png", alt, classes=pixels, style=f"aspect-ratio: {width} / {top}")
    said = f"<small>{html.escape(alt)}; a click shows all, or the first.</small>"
    return f'<details class="strip"><summary>{image}{said}</summary></details>'


def _cards(results: list[dict[str, Any]], step: int, better: str, paper: dict[str, str]) -> str:
    """The first four of HEADLINES at a step, each of the better parameters, of the data's own classes, from the most samples, and
    of these by the most steps, if there are several.
    """
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}

    def rank(result: dict[str, Any]) -> tuple[bool, bool, int, int]:
        sampling = result["definition"].get("sampling") or {}
        own, steps = not isinstance(sampling.get("labels"), list), sampling.get("steps", 0)
        count = sum(steps) if isinstance(steps, list) else steps
        return weights_of(result) == better, own, sampling.get("images", 0), count

    for result in sorted((result for result in results if step_of(result) == step), key=rank):
        parts = {name: result[name] for name in PRDC} if result["metric"] == "prdc" else {result["metric"]: result}
        found |= {name: (estimate, result) for name, estimate in parts.items()}
    shown = [name for name in HEADLINES if name in found][:4]
    cards = [_card(name, *found[name], paper.get(name)) for name in shown]
    return f'<dl class="cards">{"".join(cards)}</dl>' if cards else ""


def _card(name: str, estimate: dict[str, Any], result: dict[str, Any], paper: str | None) -> str:
    (value, spread), (title, better) = number_of(estimate), DESCRIPTIONS[name]
    arrow = {"lower": "↓", "higher": "↑"}[better]
    notes = [f'<span aria-hidden="true">{arrow}</span> {better} is better', html.escape(_of(result))]
    if paper:
        notes.append(f"the paper's: {html.escape(paper)}")
    if "not_comparable" in result:
        notes.append("not comparable with published ones")
    said = f"<strong>{value}</strong>" + (f" <span>± {spread}</span>" if spread else "")
    lines = "".join(f"<p>{note}</p>" for note in notes)
    return f'<div class="card"><dt>{html.escape(title)}</dt><dd>{said}{lines}</dd></div>'


def _of(result: dict[str, Any]) -> str:
    """What a number is of, in a few words."""
    definition, said = result["definition"], said_weights(result)
    real = definition.get("reference") or {}
    if sampling := definition.get("sampling"):
        said += [f"{sampling['images']:,} samples", sampled_by(sampling)]
        said += [definition["features"]] if definition.get("features") else []
    elif "source" in real:
        said.append(f"{real['images']:,} real images")
    return ", ".join(said)


def _ema_notes(config: Config, results: list[dict[str, Any]]) -> str:
    """A sentence for each step at which results are of an EMA that is of little use."""
    steps = sorted({step_of(result) for result in results if weights_of(result) == "ema"})
    notes = (ema.note(config.train, step) for step in steps)
    return "".join(f"<p>Note: {html.escape(note)}.</p>" for note in notes if note)


def _results(results: list[dict[str, Any]], paper: dict[str, str]) -> str:
    """The table of all results, beside the paper's numbers."""
    if not results:
        return "<p>Nothing was evaluated yet; run evaluate.py.</p>"
    head = ["metric", "step", *(["the paper's"] if paper else []), "value, and what it is of"]
    rows = [
        [
            f"{DESCRIPTIONS.get(result['metric'], (result['metric'], ''))[0]}\n{result['metric']}",
            f"{step_of(result):,}",
            *([paper.get(result["metric"], "")] if paper else []),
            f"{describe(result)}\n{made_of(result)}",
        ]
        for result in results
    ]
    of_paper = "<p><small>The paper's numbers are Ho, Jain &amp; Abbeel 2020's own, not measured here.</small></p>"
    return _table(head, rows) + (of_paper if paper else "")


Line = tuple[list[int], list[float]]


def _line(logged: list[dict[str, Any]], name: str) -> Line:
    """A logged number against steps."""
    there = [values for values in logged if isinstance(values.get(name), float | int)]
    return [values["step"] for values in there], [values[name] for values in there]


def _losses(logged: list[dict[str, Any]], reference: Reference | None) -> list[str]:
    """The losses, also by quarter of t, and held-out bits/dim, each beside the reference's."""
    figures, said = [], ""
    options: dict[str, Any] = {}
    dashed: dict[str, Line] = {}
    if reference is not None:
        curve, held_out = reference.curve, reference.held_out
        options = {"band": (curve.edges[1:], *curve.interval())}
        said = f" {say_verdict(logged, reference)} Shaded: what is expected of 99 of 100 runs."
        if held_out and any(values.get("eval_of") == held_out["of"] for values in logged):
            dashed = {name: (held_out["step"], held_out[name]) for name in (*QUARTERS, "eval_bits_per_dim")}
    beside = " Dashed: the reference." if dashed else ""
    losses = {"training images": _line(logged, "loss"), "held-out images, EMA parameters": _line(logged, "eval_loss")}
    if losses := {name: points for name, points in losses.items() if points[0]}:
        figures.append(_curve(losses, f"The training loss.{said}", x="step", y="loss", log=True, **options))
    quarters = {f"quarter {i + 1} of t": (_line(logged, name), dashed.get(name)) for i, name in enumerate(QUARTERS)}
    if all(points[0] for points, _ in quarters.values()):
        figures.append(
            _curve(
                {name: points for name, (points, _) in quarters.items()},
                f"The loss of held-out images by quarter of t, from little noise to much.{beside}",
                x="step",
                y="loss",
                log=True,
                dashed={name: points for name, (_, points) in quarters.items() if points},
            )
        )
    if (bits := _line(logged, "eval_bits_per_dim"))[0]:
        caption, name = f"Bits per dimension of held-out images.{beside}", "held-out images"
        options = {"dashed": {name: dashed["eval_bits_per_dim"]}} if dashed else {}
        figures.append(_curve({name: bits}, caption, x="step", y="bits/dim", **options))
    return figures


def _training(workdir: epath.Path, results: list[dict[str, Any]], reference: Reference | None) -> list[str]:
    """Curves against steps: losses, held-out bits/dim, and the Fréchet distance by provenance, if it has more than one step."""
    logged = read_metrics(workdir)
    figures = _losses(logged, reference)
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        if result["metric"] == "fid":
            lines.setdefault(made_of(result), {})[step_of(result)] = result["value"]
    for values in logged:
        if isinstance(values.get("eval_fid"), float | int):
            lines.setdefault(f"while training ({values.get('eval_of')})", {})[values["step"]] = values["eval_fid"]
    several = {name: (list(points), list(points.values())) for name, points in sorted(lines.items()) if len(points) > 1}
    if several:
        caption = "Fréchet distance against training steps."
        figures.append(_curve(several, caption, x="step", y="Fréchet distance", marks=True))
    return figures


def _rate_distortion(results: list[dict[str, Any]]) -> tuple[list[str], str]:
    """The paper's Figure 5 at the newest step, and a folded table of it."""
    found = [result for result in results if result["metric"] == "rate-distortion"]
    if not found:
        return [], ""
    newest = max(found, key=step_of)
    rows, columns = progressive_code(newest)
    time, rate, distortion = columns
    figures = [
        _curve({y: (columns[x], columns[y])}, f"{caption} (Figure 5).", x=x, y=y)
        for x, y, caption in (
            (time, distortion, "Distortion along the reverse process"),
            (time, rate, "Rate along the reverse process"),
            (rate, distortion, "Distortion against rate"),
        )
    ]
    of = f"<p><small>{html.escape(made_of(newest))}</small></p>"
    return figures, _folded("Rate and distortion at tenths of the reverse process", _table([*columns], rows) + of)


def _curves(workdir: epath.Path, results: list[dict[str, Any]], reference: Reference | None) -> str:
    training, (along, table) = _training(workdir, results, reference), _rate_distortion(results)
    return f"<h2>Curves</h2>{_pair(training + along)}{table}" if training or along else ""


def _figures(workdir: epath.Path, config: Config) -> str:
    pixels, said = _pixelated(config), []
    for name, caption in CAPTIONS.items():
        for end, parameters in (("", ""), ("-raw", ", raw parameters")):
            if found := _newest(workdir / EVALUATION / FOLDER, f"{name}-", end):
                step, path = found
                text = f"{caption} Step {step:,}{parameters}."
                content = path.read_bytes()
                if drawn := description_of(content):
                    text += f" Samples by {drawn}."
                image = _image(content, "png", text, classes=pixels)
                said.append(f"<figure>{image}<figcaption>{html.escape(text)}</figcaption></figure>")
    return "<h2>Figures</h2>" + _pair(said) if said else ""


def _definitions(results: list[dict[str, Any]]) -> str:
    """What each metric is, by the docstring of its function, and the software of the last result."""
    rows = []
    for name in dict.fromkeys(result["metric"] for result in results if result["metric"] in METRICS):
        title, better = DESCRIPTIONS.get(name, (name, ""))
        said = " ".join((inspect.getdoc(METRICS[name]) or "").split())
        rows.append([f"{title}\n{name}", said + (f" {better.capitalize()} is better." if better else "")])
    if not rows:
        return ""
    software = ", ".join(f"{name} {version}" for name, version in results[-1]["definition"]["software"].items())
    return _folded("Definitions", f"{_table(['metric', 'what'], rows)}<p><small>{html.escape(software)}</small></p>")


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes report.html from the workdir's files, and returns its path."""
    workdir = epath.Path(workdir)
    config, (results, notes) = read_config(workdir), read_results(workdir)
    flat = flatten(config)
    paper = papers_numbers(flat, config.data.source)
    logged = [values["step"] for values in read_metrics(workdir)]
    step = max([step_of(result) for result in results] or logged or [0])
    name, facts = _title(workdir, config, step)
    reference = find_reference(config, data_of(workdir))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(f'{name}, step {step:,}: {workdir.name}')}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{html.escape(name)}</h1><p>{html.escape(facts)}</p></header>"
        f"{_strip(workdir, config)}{_cards(results, step, _better(config, step), paper)}{_ema_notes(config, results)}"
        + _curves(workdir, results, reference)
        + _figures(workdir, config)
        + f"<h2>All results</h2>{_results(results, paper)}"
        + "".join(f"<p><small>{html.escape(note)}</small></p>" for note in notes)
        + _definitions(results)
        + _folded("Configuration", _table(["field", "value"], [[field, str(value)] for field, value in flat.items()]))
        + "</body></html>"
    )
    remove_remnants(workdir, REPORT)
    write_text(workdir / REPORT, page)
    return workdir / REPORT
