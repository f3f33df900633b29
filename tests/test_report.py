"""report.html and its figures: one page that holds everything and asks for nothing, as a browser shows it."""

import base64
import dataclasses
import datetime
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from etils import epath
from evaluated import CONFIG, make_workdir
from PIL import Image
from tiny import experiment

from ddpm_jax import config as configs
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.data.pixels import from_uint8
from ddpm_jax.data.sheets import description_of, enlarge, grid, png_bytes
from ddpm_jax.evaluation.evaluation import EVALUATION, Evaluation, Options
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.figures import (
    FOLDER,
    chain_of,
    curves,
    draw_figures,
    draw_samples,
    interpolation,
    nearest_grid,
    progressive,
    shared,
)
from ddpm_jax.evaluation.metrics import DESCRIPTIONS, METRICS, ON_REQUEST, evaluate, step_of, weights_of
from ddpm_jax.evaluation.paper import papers_numbers
from ddpm_jax.evaluation.report import write_report
from ddpm_jax.evaluation.results import describe, plain, read_results, with_spread
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.workdir import data_of, load_run


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A workdir with all metrics that pixels allow, the figures, a second FID at a later step, and the report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        workdir = make_workdir(tmp_path_factory.mktemp("runs") / "a <run>")
        run = load_run(workdir)
        evaluation = Evaluation.of_run(
            run, workdir, PIXELS, Options(num_images=12, num_real=20, batch_size=8, bootstrap=0)
        )
        results = evaluate(evaluation, tuple(name for name in METRICS if name != "is" and name not in ON_REQUEST))
        draw_figures(run, evaluation, workdir / EVALUATION / FOLDER, results)
    later = json.loads(json.dumps(results["fid"]))
    del later["sha256"]  # as earlier versions wrote it
    later["definition"]["sampling"]["step"], later["value"] = 80, 1.25
    (workdir / "evaluation" / "fid-00000080-00000000.json").write_text(json.dumps(later))
    later["definition"]["sampling"]["images"] = 50  # another way to take it, at one step only
    (workdir / "evaluation" / "fid-00000080-11111111.json").write_text(json.dumps(later))
    with (workdir / "metrics.jsonl").open("a") as file:
        for step, fid in ((10, 8.0), (20, 4.0)):
            file.write(json.dumps({"step": step, "eval_loss": 1.0, "eval_fid": fid, "eval_of": "0123abcd"}) + "\n")
    return workdir, evaluation, results, write_report(workdir).read_text()


def pictures(page):
    """The embedded pictures' kinds and contents, by their captions."""
    found = re.findall(r'<img[^>]* src="data:image/([\w+]+);base64,([^"]+)" alt="([^"]*)"', page)
    return {alt: (kind, base64.b64decode(content)) for kind, content, alt in found}


def of_metric(name, step):
    """How the row of a metric starts in the table of results."""
    return f'<th scope="row">{DESCRIPTIONS[name][0]}<br><small>{name}</small></th><td>{step}</td>'


def test_the_report_shows_every_result_with_what_it_is_of(reported):
    _, _, results, page = reported
    for name, result in results.items():
        assert of_metric(name, 40) in page
        assert describe(result).replace("'", "&#x27;") in page
    assert "<small>12 samples, ancestral, 10 steps, seed 0; pixels; 20 images of digits</small>" in page
    assert "not comparable with published FIDs" in page


def test_the_report_holds_config_curves_and_figures(reported):
    page = reported[3]
    assert '<th scope="row">diffusion.T</th><td>10</td>' in page
    shown = pictures(page)
    for start in (
        "Samples of step 40",
        "The training loss",
        "Fréchet distance against training steps",
        "Distortion along",
        "Rate along",
        "Distortion against rate",
        "Progressive",
        "Samples that share",
        "Between two",
        "Samples (first column)",
    ):
        assert any(caption.startswith(start) for caption in shown), start
    for kind, content in shown.values():
        assert content.startswith(b"\x89PNG") if kind == "png" else b"<svg" in content


def test_the_curves_have_a_line_for_each_way_a_number_was_taken(reported):
    curves = {caption: content.decode() for caption, (kind, content) in pictures(reported[3]).items() if "svg" in kind}
    fid, loss = (
        next(content for caption, content in curves.items() if caption.startswith(start))
        for start in ("Fréchet distance against training steps.", "The training loss.")
    )
    assert "12 samples, ancestral, 10 steps, seed 0" in fid
    assert "while training (0123abcd)" in fid
    assert "50 samples" not in fid
    assert "held-out images, EMA parameters" in loss


def test_the_report_asks_for_nothing_from_a_network(reported):
    outside = re.findall(r'(?:src|href|url)\s*[=(]\s*"?(?!data:)([^">)]+)', reported[3])
    assert outside == []
    assert "<script" not in reported[3]


def test_a_report_can_be_written_before_anything_was_evaluated(tmp_path):
    page = write_report(make_workdir(tmp_path / "run")).read_text()
    assert "The training loss" in page
    assert "distance against" not in page
    assert "run evaluate.py" in page
    assert "step 40" in page  # of the log


def test_the_papers_numbers_stand_beside_those_of_a_paper_config_and_no_other(reported, tmp_path):
    assert "the paper" not in reported[3].lower()
    workdir = make_workdir(tmp_path / "run")
    (workdir / "config.json").write_text(json.dumps(configs.to_json(load_config("configs/cifar10.py"))))
    (workdir / "evaluation").mkdir()
    shutil.copy(reported[0] / "evaluation" / "fid-00000080-00000000.json", workdir / "evaluation")
    page = write_report(workdir).read_text()
    assert '<th scope="col">the paper&#x27;s</th>' in page
    assert "<p>the paper's: 3.17 (train set), 5.24 (test set)</p>" in page  # beside the number at the top
    assert "<td>3.17 (train set), 5.24 (test set)</td>" in page
    assert "2020's own, not measured here" in page


@pytest.mark.parametrize(
    ("changes", "fid"),
    [
        ({}, "3.17 (train set), 5.24 (test set)"),
        ({"diffusion": {"loss": "vb"}}, "13.51"),
        ({"diffusion": {"loss": "vb", "prediction": "x_prev"}}, "13.22"),
        ({"diffusion": {"loss": "vb", "prediction": "x_prev", "variance": "learned"}}, "23.69"),
        ({"model": {"ch": 64}}, None),
        ({"diffusion": {"schedule": "cosine"}}, None),
        ({"data": {"source": "pictures.zip"}}, None),
        ({"data": {"source": "tfds:cifar100:train"}}, None),
        ({"data": {"source": "CIFAR-10_train.zip"}}, "3.17 (train set), 5.24 (test set)"),
        ({"diffusion": {"loss_weighting": "min_snr"}}, None),
        ({"diffusion": {"t_sampler": "loss_history"}}, None),
        ({"model": {"num_res_blocks": 1}}, None),
        ({"train": {"lr": 1e-2}}, None),
        ({"train": {"flip": False}}, None),
        ({"model": {"dtype": "bfloat16"}}, "3.17 (train set), 5.24 (test set)"),
    ],
)
def test_paper_configs_are_told_by_every_field_that_matters(changes, fid):
    config = load_config("configs/cifar10.py")
    for section, fields in changes.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    assert papers_numbers(configs.flatten(config), config.data.source).get("fid") == fid


@pytest.mark.parametrize(
    ("name", "fid"),
    [
        ("cifar10_eps_l", "13.51"),
        ("cifar10_mean_l", "13.22"),
        ("cifar10_mean_l_learned", "23.69"),
        ("lsun_bedroom256", "6.36"),
        ("lsun_bedroom256_large", "4.90"),
        ("lsun_church256", "7.89"),
        ("lsun_cat256", "19.75"),
        ("celebahq256", None),
    ],
)
def test_every_config_of_the_paper_has_its_numbers(name, fid):
    config = load_config(f"configs/{name}.py")
    assert papers_numbers(configs.flatten(config), config.data.source).get("fid") == fid


# ---- What people see first


def test_the_title_says_data_set_run_config_step_and_date(reported):
    head = re.search(r"<title>(.*?)</title>.*<header>(.*?)</header>", reported[3], re.DOTALL)
    today = datetime.date.today()
    assert head[1] == "digits, step 80: a &lt;run&gt;"  # whatever the folder is called
    for fact in ("<h1>digits</h1>", "run a &lt;run&gt;", "T = 10, linear", "step 80", f"{today:%B %Y}"):
        assert fact in head[2], fact


def test_samples_come_first_then_four_numbers_then_curves_and_folded_configuration(reported, alone):
    places = [reported[3].index(part) for part in ("<h1>", "Samples of step 40", "The training loss", "All results")]
    assert places == sorted(places)
    page = write_report(alone).read_text()
    cards = re.findall(r'<div class="card"><dt>(.*?)</dt><dd><strong>([^<]+)</strong>(.*?)</dd>', page)
    assert [name for name, *_ in cards] == ["Fréchet distance", "Bits per dimension", "Precision", "Recall"]
    arrows = [(arrow, better) for _, _, rest in cards for arrow, better in re.findall(r"([↓↑])</span> (\w+) is", rest)]
    assert arrows == [("↓", "lower")] * 2 + [("↑", "higher")] * 2
    assert page.index('class="card"') < page.index("The training loss")
    for folded in ("Definitions", "Configuration"):
        assert f"<details><summary>{folded}</summary>" in page


def test_one_of_several_processes_writes_the_report_alone(reported, monkeypatch):
    """Without Orbax, whose restore would wait for the others."""
    monkeypatch.delattr(Checkpoints, "_restore")
    assert data_of(reported[0]) is not None
    assert write_report(reported[0]).exists()


def test_a_card_has_the_number_of_most_samples(reported, tmp_path):
    """Of step 80 there are two distances: 1.25 of 12 samples, and the same of 50."""
    workdir = epath.Path(shutil.copytree(reported[0], tmp_path / "run"))
    path = workdir / "evaluation" / "fid-00000080-11111111.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"value": 2.5}))
    assert "<strong>2.500</strong>" in write_report(workdir).read_text()
    assert "<strong>1.250</strong>" in reported[3]


def test_numbers_of_samples_that_were_drawn_otherwise_read_otherwise(reported, tmp_path):
    """Of as many samples the card has those of the data's classes by the most steps, whatever the files' names."""
    workdir = epath.Path(shutil.copytree(reported[0], tmp_path / "run"))
    [fid] = (workdir / EVALUATION).glob("fid-00000080-0*.json")
    others = ({"steps": 20, "guidance": 3.0}, {"steps": 50, "clip": "none"}, {"steps": 90, "labels": ["3"]})
    for value, other in enumerate(others, start=5):
        for name in (f"{value}" * 8, f"{9 - value}" * 8):  # both orders
            result = json.loads(fid.read_text())
            result["definition"]["sampling"] |= {"images": 70, **other}
            (workdir / EVALUATION / f"fid-00000080-{name}.json").write_text(json.dumps(result | {"value": value}))
    page = write_report(workdir).read_text()
    assert "<strong>6</strong>" in page
    assert "70 samples, ancestral, 50 steps, clip none, pixels" in page
    for said in ("20 steps, guidance 3.0, seed 0", "50 steps, clip none, seed 0", "90 steps, labels 3, seed 0"):
        assert f"70 samples, ancestral, {said}" in page


def test_without_figures_the_samples_are_shown_and_without_those_the_grid_of_the_training(reported, tmp_path):
    workdir, evaluation, *_ = reported
    for name in ("drawn", "grid"):
        make_workdir(tmp_path / name)
    draw_samples(load_run(workdir), evaluation, epath.Path(tmp_path / "drawn" / EVALUATION / FOLDER))
    (tmp_path / "grid" / "samples").mkdir()
    shutil.copy(workdir / EVALUATION / FOLDER / "samples-00000040.png", tmp_path / "grid/samples/step_00000040.png")
    for name in ("drawn", "grid"):
        page = write_report(tmp_path / name).read_text()
        [(alt, (kind, content))] = [found for found in pictures(page).items() if found[0].startswith("Samples")]
        assert (alt, kind) == ("Samples of step 40, ancestral, 10 steps", "png")
        assert content == (workdir / EVALUATION / FOLDER / "samples-00000040.png").read_bytes()
        assert "<h2>Figures</h2>" not in page
    newer = tmp_path / "drawn" / "samples"
    newer.mkdir()
    (newer / "step_00000090.png").write_bytes(b"half a picture")  # one that is broken stops no report
    assert description_of(png_bytes(np.zeros((2, 2, 1), np.uint8), "by ancestral")) == "by ancestral"
    assert description_of(png_bytes(np.zeros((2, 2, 1), np.uint8)).replace(b"\0\0\0\rIHDR", b"\0\0\0\1IHDR")) == ""
    assert "Samples of step 90" in write_report(tmp_path / "drawn").read_text()


def test_while_the_ema_is_of_little_use_the_raw_parameters_come_first(reported, tmp_path):
    workdir = epath.Path(shutil.copytree(reported[0], tmp_path / "run"))
    [fid] = (workdir / EVALUATION).glob("fid-00000080-0*.json")
    result = json.loads(fid.read_text())
    result["definition"]["sampling"]["weights"], result["value"] = "raw", 7.0
    (workdir / EVALUATION / "fid-00000080-22222222.json").write_text(json.dumps(result))
    drawn, grid_of_training = (
        workdir / EVALUATION / FOLDER / "samples-00000040.png",
        workdir / "samples/step_00000040.png",
    )
    shutil.copy(drawn, drawn.with_name("samples-00000040-raw.png"))
    grid_of_training.parent.mkdir()
    shutil.copy(drawn, grid_of_training)

    def shown():
        page = write_report(workdir).read_text()
        return next(alt for alt in pictures(page) if alt.startswith("Samples of")), "<strong>7</strong>" in page

    assert shown() == ("Samples of step 40, ancestral, 10 steps", False)
    values = json.loads((workdir / "config.json").read_text())
    values["train"]["ema_decay"] = 0.9999
    (workdir / "config.json").write_text(json.dumps(values))
    assert shown() == ("Samples of step 40, raw parameters, ancestral, 10 steps", True)
    drawn.with_name("samples-00000040-raw.png").unlink()
    assert shown() == ("Samples of step 40, EMA (left) and raw parameters (right), ancestral, 10 steps", True)


def test_the_strip_ends_between_two_rows_of_samples(tmp_path):
    workdir = make_workdir(tmp_path / "run")
    folder = workdir / EVALUATION / FOLDER
    folder.mkdir(parents=True)
    sheet = enlarge(grid(np.full((64, 8, 8, 1), 255, np.uint8)))
    (folder / "samples-00000040.png").write_bytes(png_bytes(sheet))
    width, height = map(int, re.search(r"aspect-ratio: (\d+) / (\d+)", write_report(workdir).read_text()).groups())
    assert width == sheet.shape[1]
    assert sheet[height - 1].any()
    assert not sheet[height].any()  # the gap


@pytest.mark.parametrize(
    ("value", "spread", "said"),
    [
        (1.2523898, 0.0896, ("1.25", "0.09")),
        (5.403824, 0.01411, ("5.404", "0.014")),
        (0.0, 0.0, ("0", "")),
        (1.0, 0.0, ("1", "")),
        (12345.6, 120.0, ("12,346", "120")),
        (-0.0001, 0.02, ("0.00", "0.02")),
        (3.1, 1e-9, ("3.100", "")),
        (3.1, 5e-324, ("3.100", "")),
        (float("inf"), 1.0, ("inf", "")),
        (2.0, float("nan"), ("2", "")),
        (2.0, None, ("2", "")),
    ],
)
def test_numbers_have_the_digits_that_their_spread_allows(value, spread, said):
    assert with_spread(value, spread) == said


def test_a_number_has_no_exponent():
    assert plain(1.0551e-05) == "0.000011"
    assert plain(1.0551e-05, decimals=3) == "below 0.001"
    assert plain(1e-12) == "below 0.000001"
    assert plain(123456.0) == "123,456"
    estimate = {"value": 0.0, "standard_error": 0.0}
    result = {"metric": "prdc", "precision": estimate, "recall": estimate, "density": estimate, "coverage": estimate}
    assert describe(result) == "precision 0, recall 0, density 0, coverage 0"


# ---- Damaged results


@pytest.fixture(scope="module")
def alone(reported, tmp_path_factory):
    """A workdir with the result files of one step, that tests copy and damage."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(reported[0], workdir, ignore=shutil.ignore_patterns("parts", "figures", "fid-00000080*"))
    return workdir


DAMAGES = {
    "a digit": lambda b: re.sub(
        rb'"value": (\d)', lambda m: b'"value": 9' if m[1] != b"9" else b'"value": 8', b, count=1
    ),
    "half": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "zeros": lambda b: bytes(len(b)),
    "binary": lambda b: b"\xff\xfe" + b,
    "[]": lambda b: b"[]",
    "{}": lambda b: b"{}",
    "brackets": lambda b: b"[" * 100_000,
    "nan": lambda b: re.sub(rb'"value": [\d.e-]+', b'"value": NaN', b, count=1),
    "another JSON": lambda b: b'{"metric": ["fid"], "definition": {"sampling": {"step": "x"}}}',
    "an old one, of texts": lambda b: b'{"metric": "fid", "value": "3", "definition": {"sampling": {"step": 3}}}',
    "an old one of no table": lambda b: b'{"metric": "rate-distortion", "definition": {"bound": {"step": 3, "T": 4}}}',
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_result_is_left_out_with_a_note_and_the_others_are_reported(how, alone, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    shutil.copytree(alone, workdir)
    [path] = (workdir / "evaluation").glob("nll-*.json")
    path.write_bytes(DAMAGES[how](path.read_bytes()))
    page = write_report(workdir).read_text()
    assert f"{path.name} is left out (" in page
    assert "evaluate again, or move it away" in page
    assert of_metric("fid", 40) in page
    assert of_metric("nll", 40) not in page
    there = {result["metric"] for result in read_results(workdir)[0] if step_of(result) == 40}
    assert there == set(METRICS) - {"is", "nll", *ON_REQUEST}


def test_a_result_in_anothers_place_is_left_out(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    [one], [other] = ((tmp_path / "run" / "evaluation").glob(f"{name}-*.json") for name in ("kid", "nll"))
    shutil.copy(one, other)
    page = write_report(tmp_path / "run").read_text()
    assert f"{other.name} is left out (it is not what was written there)" in page
    assert page.count(of_metric("kid", 40)) == 1


def test_other_files_beside_the_figures_are_no_figures(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    (tmp_path / "run" / "evaluation" / "figures").mkdir()
    (tmp_path / "run" / "evaluation" / "figures" / "samples-mine.png").write_bytes(b"mine")
    assert "<h2>Figures</h2>" not in write_report(tmp_path / "run").read_text()


# ---- Figures


@pytest.fixture(scope="module")
def chain(reported):
    return chain_of(load_run(reported[0]), seed=0)


def test_the_chain_of_a_figure_ends_at_the_sample(reported, chain):
    """Progressive generation in parts, each x_0 predicted on the way; the last is the sample of that index itself."""
    frames = progressive(chain, frames=4).reshape(8, 4, 8, 8, 1).astype(int)
    samples = reported[1].first_samples().astype(int)
    assert np.abs(frames[:, -1] - samples).max() <= 1
    assert np.abs(frames[:, 0] - samples).max() > 1


def test_shared_latents_and_interpolations_agree_where_they_must(reported, chain):
    rows = shared(chain).reshape(4, 8, -1).astype(int)
    assert np.ptp(rows[0], axis=0).max() > 0
    # Image 0's own noise goes on where the others leave its path: the first column is image 0 in every row.
    assert np.abs(rows[:, 0] - reported[1].first_samples()[0].reshape(-1)).max() <= 1
    real = reported[1].read(range(2))
    between = interpolation(chain, experiment(CONFIG).process.schedule, from_uint8(real)).reshape(5, 8, 8, 8, 1)
    for row in between:
        np.testing.assert_array_equal(row[0], real[0])
        np.testing.assert_array_equal(row[-1], real[1])
    assert (between[0, 1] != between[0, 6]).any()


def test_nearest_grid_puts_each_sample_before_its_neighbours():
    real = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    images = nearest_grid(np.array([100, 200], np.uint8).reshape(2, 1, 1, 1), real.__getitem__, [[3, 1], [7, 9]])
    assert images.ravel().tolist() == [100, 3, 1, 200, 7, 9]


def test_figures_are_readable_pictures_of_the_right_size(reported):
    folder = reported[0] / "evaluation" / "figures"
    assert not list(folder.glob("*.tmp"))
    sizes = {}
    for path in folder.glob("*.png"):
        with Image.open(str(path)) as picture:
            sizes[path.stem.split("-")[0]] = picture.size
    assert set(sizes) == {"samples", "progressive", "shared_latents", "interpolation", "nearest"}
    width, height = sizes["progressive"]  # ten columns and eight rows of 8 pixels and a gap, enlarged
    assert width * (8 * 9 - 1) == height * (10 * 9 - 1)


@pytest.mark.parametrize("ys", [[0.6, 0.09], [0.95, 0.5], [1000.0, 1e-5], [0.5, 0.5], [0.5, -0.5], [0.0, 0.1]])
def test_ticks_are_plain_numbers(ys):
    content = curves({"loss": ([0, 800_000], ys)}, x="step", y="loss", log=True).decode()
    labels = [comment for comment in re.findall(r"<!-- (.*?) -->", content) if comment not in ("step", "loss")]
    assert len(labels) >= 6
    for label in labels:
        assert re.fullmatch(r"[-\u2212]?[\d,]+(\.\d+)?", label), label
    assert "200,000" in labels


def test_curves_are_drawn_with_their_labels():
    content = curves({"loss": ([1, 2], [0.5, 0.1])}, x="the step", y="the loss").decode()
    assert "<!-- the step -->" in content
    assert "<!-- the loss -->" in content


# ---- In a browser


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    pictures: images.length,
    drawn: images.filter((image) => image.complete && image.naturalWidth > 0).length,
    rows: document.querySelectorAll("tbody tr").length,
    nameless: images.filter((image) => !image.alt).length,
    samples: document.querySelector(".strip img").getBoundingClientRect().top,
    columns: getComputedStyle(document.querySelector(".pair")).gridTemplateColumns.split(" ").length,
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
});</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1000, 500])
def test_a_browser_shows_table_and_pictures_without_an_error(reported, tmp_path, width):
    """On a desk and, at a phone's proportions (Chromium's windows are at least 500 wide), with nothing wider than the page."""
    path = tmp_path / "report.html"
    path.write_text(reported[3].replace("</body>", PROBE + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", f"--window-size={width},900", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    seen = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert seen["pictures"] == seen["drawn"] == len(pictures(reported[3]))
    assert seen["rows"] == reported[3].count("<tr>") - reported[3].count("<thead>")
    assert seen["wider"] <= 0
    assert seen["nameless"] == 0
    assert seen["samples"] < 200  # on the first screen
    assert seen["columns"] == (2 if width == 1000 else 1)
    assert "CONSOLE" not in done.stderr, done.stderr


def test_an_ema_of_little_use_is_told_and_raw_results_are_labelled(alone, tmp_path):
    workdir = epath.Path(shutil.copytree(alone, tmp_path / "run"))
    values = json.loads((workdir / "config.json").read_text())
    assert "of the EMA" not in write_report(workdir).read_text()
    values["train"]["ema_decay"] = 0.9999
    (workdir / "config.json").write_text(json.dumps(values))
    [path] = (workdir / "evaluation").glob("kid-*.json")
    result = json.loads(path.read_text())
    del result["sha256"]  # as earlier versions wrote it
    result["definition"]["sampling"]["weights"] = "raw"
    path.write_text(json.dumps(result))
    page = write_report(workdir).read_text()
    assert "of the EMA at step 40 is still the initial parameters" in page
    assert page.count("raw parameters;") == 1
    assert [result["metric"] for result in read_results(workdir)[0] if weights_of(result) == "raw"] == ["kid"]
