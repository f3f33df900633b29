"""report.html and its figures: one page that holds everything and asks for nothing, as a browser shows it."""

import base64
import dataclasses
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
from ddpm_jax.evaluation.evaluation import EVALUATION, Evaluation, Options
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.figures import (
    FOLDER,
    chain_of,
    curves,
    draw_figures,
    interpolation,
    nearest_grid,
    progressive,
    shared,
)
from ddpm_jax.evaluation.metrics import METRICS, evaluate
from ddpm_jax.evaluation.paper import papers_numbers
from ddpm_jax.evaluation.report import describe, results_of_step, write_report
from ddpm_jax.training.workdir import load_run


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
        results = evaluate(evaluation, tuple(name for name in METRICS if name != "is"))
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


def test_the_report_shows_every_result_with_what_it_is_of(reported):
    _, _, results, page = reported
    for name, result in results.items():
        assert f"<td>{name}</td><td>40</td>" in page
        assert describe(result).replace("'", "&#x27;") in page
    assert "<small>12 samples, ancestral, 10 steps, seed 0; pixels; 20 images of digits</small>" in page
    assert "not comparable with published FIDs" in page


def test_the_report_holds_config_curves_and_figures(reported):
    page = reported[3]
    assert "<td>diffusion.T</td><td>10</td>" in page
    assert "a &lt;run&gt;" in page  # whatever the folder is called
    shown = pictures(page)
    for start in (
        "The training loss",
        "FID against training steps",
        "Distortion along",
        "Rate along",
        "Distortion against rate",
        "Samples.",
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
    fid, loss = curves["FID against training steps."], curves["The training loss."]
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
    assert "FID against" not in page


def test_the_papers_numbers_stand_beside_those_of_a_paper_config_and_no_other(reported, tmp_path):
    assert "the paper" not in reported[3].lower()
    workdir = make_workdir(tmp_path / "run")
    (workdir / "config.json").write_text(json.dumps(configs.to_json(load_config("configs/cifar10.py"))))
    (workdir / "evaluation").mkdir()
    shutil.copy(reported[0] / "evaluation" / "fid-00000080-00000000.json", workdir / "evaluation")
    page = write_report(workdir).read_text()
    assert "<th>the paper&#x27;s</th>" in page
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
    assert "<td>fid</td>" in page
    assert "<td>nll</td>" not in page
    assert {metric for metric, *_ in results_of_step(workdir, 40, "ema")} == set(METRICS) - {"is", "nll"}


def test_a_result_in_anothers_place_is_left_out(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    [one], [other] = ((tmp_path / "run" / "evaluation").glob(f"{name}-*.json") for name in ("kid", "nll"))
    shutil.copy(one, other)
    page = write_report(tmp_path / "run").read_text()
    assert f"{other.name} is left out (it is not what was written there)" in page
    assert page.count("<td>kid</td>") == 1


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
    between = interpolation(chain, experiment(CONFIG).process.schedule, real).reshape(5, 8, 8, 8, 1)
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
    assert [metric for metric, *_ in results_of_step(workdir, 40, "raw")] == ["kid"]
