"""A run reduced to a result that is shipped, and what users have of one: pretrained weights, and a curve beside their own."""

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from evaluated import make_workdir
from interop import convert, run_script
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tiny import experiment, one_device, read_images, tiny

from ddpm_jax.commands.arguments import PARSERS
from ddpm_jax.commands.config_file import command_of, load_config
from ddpm_jax.commands.configs import shipped
from ddpm_jax.commands.train import train
from ddpm_jax.config import differences, from_json
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import DamagedFileError, fingerprint
from ddpm_jax.core.sharding import make_mesh
from ddpm_jax.data import open_source
from ddpm_jax.data.sheets import enlarge, grid
from ddpm_jax.evaluation.reference import Curve, Reference, bin_means, find_reference, losses_of, say_verdict
from ddpm_jax.evaluation.report import write_report
from ddpm_jax.evaluation.results import plain
from ddpm_jax.generation.generator import draw, make_generator, sample_key
from ddpm_jax.interop.result import seconds_of
from ddpm_jax.training import shipped as shipped_module
from ddpm_jax.training.metric_writer import read_metrics
from ddpm_jax.training.parameters import flatten
from ddpm_jax.training.shipped import read_result
from ddpm_jax.training.workdir import load_run

CONFIG = tiny(
    model={"ch_mult": (1,), "attn_resolutions": (8,), "dropout": 0.0},
    diffusion={"T": 8},
    train={
        "save_every": 20,
        "eval_every": 20,
        "eval_source": "digits",
        "eval_images": 16,
    },
)
SEEDS = (0, 1, 2)
ROOT = Path(__file__).parent.parent


def with_seed(seed):
    return dataclasses.replace(CONFIG, seed=seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of results with the result `tiny` of three runs, and their workdirs."""
    folder = tmp_path_factory.mktemp("made")
    workdirs = [folder / f"seed_{seed}" for seed in SEEDS]
    for seed, workdir in zip(SEEDS, workdirs, strict=True):
        train(experiment(with_seed(seed)), workdir, mesh=one_device())
    convert("to-result", workdirs[0], folder / "results/tiny", "--more", *workdirs[1:], "--hardware", "a machine")
    return folder / "results", workdirs


@pytest.fixture
def results(made, monkeypatch):
    """The same, as if the package came with it."""
    monkeypatch.setattr(shipped_module, "FOLDER", made[0])
    return made[0]


# ---- What a result holds


@pytest.mark.slow
def test_a_result_holds_what_the_runs_were(made):
    folder, workdirs = made
    result, lines = read_result(epath.Path(folder / "tiny")), read_metrics(epath.Path(workdirs[0]))
    assert from_json(result["config"]) == CONFIG
    assert (result["step"], result["seeds"], result["hardware"]) == (40, [0, 1, 2], "a machine")
    assert result["data"] == open_source(CONFIG.data).identity
    assert result["parameters"] == sum(a.size for a in jax.tree.leaves(load_run(workdirs[0]).params))
    assert result["held_out"]["step"] == [20, 40]
    assert result["held_out"]["eval_loss"] == [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert result["files"] == {name: fingerprint(epath.Path(folder / "tiny" / name)) for name in result["files"]}
    assert set(result["files"]) | {"result.json"} == {path.name for path in (folder / "tiny").iterdir()}
    assert PARSERS["train"](shlex.split(result["command"])[2:]).config == CONFIG


@pytest.mark.slow
def test_its_curve_is_the_mean_of_the_runs(made):
    folder, workdirs = made
    curve = read_result(epath.Path(folder / "tiny"))["curve"]
    assert curve["runs"] == 3
    means = [bin_means(losses_of(read_metrics(epath.Path(w))), curve["edges"]) for w in workdirs]
    np.testing.assert_allclose(curve["loss"], np.mean(means, axis=0), rtol=1e-12)
    relative = np.var(means, axis=0, ddof=1) / np.mean(means, axis=0) ** 2  # averaged over a bin and its neighbours
    expected = [relative[:2].mean(), *np.convolve(relative, np.full(3, 1 / 3), "valid"), relative[-2:].mean()]
    np.testing.assert_allclose((np.array(curve["spread"]) / curve["loss"]) ** 2, expected, rtol=1e-9)
    assert curve["freedom"] == [4, *[6] * (len(relative) - 2), 4]


def test_its_time_is_that_of_the_logged_steps():
    lines = [{"step": 10, "loss": 1.0, "steps_per_s": 5.0}, {"step": 10, "eval_loss": 1.0}]
    lines += [{"step": 40, "loss": 1.0, "steps_per_s": 10.0}]
    assert seconds_of(lines) == pytest.approx(10 / 5 + 30 / 10)


@pytest.mark.slow
def test_its_picture_is_the_first_64_samples_of_seed_0(made):
    folder, workdirs = made
    run = load_run(workdirs[0])
    images = np.asarray(draw(make_generator(run.experiment, run.mesh), run.params, sample_key(0), range(64), size=64))
    picture = np.asarray(Image.open(folder / "tiny" / "samples.png"))
    np.testing.assert_array_equal(picture, enlarge(grid(images))[..., 0])


@pytest.mark.slow
def test_runs_that_do_not_go_together_are_refused(made, tmp_path):
    folder, workdirs = made
    other = make_workdir(tmp_path / "other")
    with pytest.raises(UsageError, match="other has another config than"):
        convert("to-result", workdirs[0], tmp_path / "new", "--more", other)
    with pytest.raises(UsageError, match="is not empty"):
        convert("to-result", workdirs[0], folder / "tiny")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_the_command_that_is_told_is_of_the_config(name):
    assert command_of(load_config(name), "runs/x") == f"ddpm-jax train {name} --workdir runs/x"


def test_the_command_that_is_told_has_every_field_that_differs():
    config = load_config("cifar10")
    changed = dataclasses.replace(
        config,
        seed=3,
        data=dataclasses.replace(config.data, source="my pictures"),
        model=dataclasses.replace(config.model, ch_mult=(1, 2, 3), remat=True),
        train=dataclasses.replace(config.train, flip=False, lr=1e-3),
    )
    words = shlex.split(command_of(changed, "runs/x"))
    assert len(differences(config, changed)) == 6
    assert PARSERS["train"](words[2:]).config == changed


# ---- Pretrained weights


@pytest.mark.slow
def test_pretrained_weights_are_the_runs(results, made):
    ours, theirs = load_run("pretrained:tiny"), load_run(made[1][0])
    assert (ours.config, ours.step, ours.weights) == (CONFIG, 40, "ema")
    for path, array in flatten(theirs.params).items():
        np.testing.assert_array_equal(flatten(ours.params)[path], array)
        assert flatten(ours.params)[path].sharding == array.sharding


@pytest.mark.slow
def test_pretrained_weights_are_sampled_from_by_name(results, made, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    run_script("sample", "pretrained:tiny", "--num-images", 8)
    out = Path("generated/tiny/step_40_ema_ancestral_seed_0")
    assert f"8 images of step 40 are in {out}" in capsys.readouterr().out
    run_script("sample", made[1][0], "--num-images", 8, "--out", "theirs")
    np.testing.assert_array_equal(read_images(out / "images.npz"), read_images(Path("theirs/images.npz")))


@pytest.mark.slow
def test_a_file_that_export_made_is_taken_in_a_workdirs_place(made, tmp_path):
    convert("export", made[1][0], tmp_path / "mine.safetensors", "--weights", "raw")
    one = make_mesh(devices=jax.devices()[:1])
    ours = load_run(tmp_path / "mine.safetensors", weights="raw", mesh=one)
    theirs = load_run(made[1][0], weights="raw", mesh=one)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    with pytest.raises(UsageError, match="holds the raw parameters; ask for --weights raw"):
        load_run(tmp_path / "mine.safetensors")


@pytest.mark.slow
def test_what_is_not_there_is_refused(results):
    with pytest.raises(
        UsageError, match=r"^pretrained:tinny does not come with this package; perhaps you meant pretrained:tiny$"
    ):
        load_run("pretrained:tinny")
    with pytest.raises(
        UsageError, match=r"^pretrained:zzz does not come with this package; those there are pretrained:tiny$"
    ):
        load_run("pretrained:zzz")
    with pytest.raises(UsageError, match="holds the parameters of step 40, not of step 20"):
        load_run("pretrained:tiny", step=20)
    with pytest.raises(UsageError, match="holds the ema parameters"):
        load_run("pretrained:tiny", weights="raw")
    with pytest.raises(UsageError, match=r"none\.safetensors does not exist"):
        load_run("none.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights.safetensors", "result.json"])
def test_a_flipped_bit_is_noticed(name, results, made):
    path = made[0] / "tiny" / name
    content = path.read_bytes()
    changed = bytearray(content)
    changed[changed.index(b"loss") if name == "result.json" else -3] ^= 1
    try:
        path.write_bytes(changed)
        with pytest.raises(DamagedFileError, match="install the package again"):
            load_run("pretrained:tiny")
    finally:
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:-1], "is damaged"),
        (lambda content: b"", "is damaged"),
        (lambda content: content.replace(b'"step"', b'"spet"'), "has no config, step and weights of ours"),
        (lambda content: content.replace(b'\\"ch\\": 8', b'\\"ch\\": 4'), "does not fit the network of its config"),
    ],
)
def test_a_file_that_is_no_run_is_refused(change, reason, made, tmp_path):
    content = (made[0] / "tiny" / "weights.safetensors").read_bytes()
    assert change(content) != content
    (tmp_path / "x.safetensors").write_bytes(change(content))
    with pytest.raises(UsageError, match=reason):
        load_run(tmp_path / "x.safetensors")


@pytest.mark.slow
def test_pretrained_weights_become_a_run_that_goes_on(results, tmp_path):
    convert("from-parameters", "pretrained:tiny", tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.step == 40
    jax.tree.map(np.testing.assert_array_equal, run.params, load_run("pretrained:tiny").params)
    longer = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=44, save_every=4, eval_every=0))
    assert int(train(experiment(longer), tmp_path / "run", mesh=one_device()).step) == 44


@pytest.mark.slow
def test_another_training_may_start_from_them(results, tmp_path):
    start = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=2, save_every=2, eval_every=0))
    start = dataclasses.replace(start, train=dataclasses.replace(start.train, init_from="pretrained:tiny", log_every=2))
    state = train(experiment(start), tmp_path / "run", mesh=one_device())
    given = flatten(load_run("pretrained:tiny").params)["conv_in/kernel"]
    assert 0 < np.abs(np.asarray(flatten(state.params)["conv_in/kernel"]) - given).max() < 0.01


@pytest.mark.slow
def test_evaluate_says_that_they_need_a_folder(results):
    with pytest.raises(UsageError, match="ddpm-jax convert from-parameters pretrained:tiny runs/NAME"):
        run_script("evaluate", "pretrained:tiny", "--features", "pixels")


# ---- Am I on track?


def scalars(folder):
    """The steps and values of the scalars in TensorBoard's events."""
    (path,) = folder.glob("events*")
    content, position, found = path.read_bytes(), 0, {}
    while position < len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        event = Event.FromString(content[position + 12 : position + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        position += length + 16
    return found


@pytest.mark.slow
def test_training_says_where_its_loss_lies_and_tensorboard_shows_the_reference(results, made, tmp_path, capsys):
    shown = tmp_path / "with"
    train(experiment(with_seed(1)), shown, mesh=one_device())
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "what is expected" in line]
    assert len(lines) == 2  # one at each checkpoint
    assert all("3 runs of results/tiny have" in line for line in lines)
    assert "Loss" in lines[-1]
    assert "over steps" in lines[-1]
    curve = read_result(epath.Path(results / "tiny"))["curve"]
    expected = {("loss", step): loss for step, loss in zip(curve["edges"][1:], curve["loss"], strict=True)}
    found = scalars(shown / "reference")
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}
    # The same run without a reference has computed and logged the same.
    plain = made[1][1]
    assert not (plain / "reference").exists()
    for ours, theirs in zip(read_metrics(epath.Path(shown)), read_metrics(epath.Path(plain)), strict=True):
        assert {**ours, **theirs} == {**ours, **{k: v for k, v in theirs.items() if "_per_s" in k}}


@pytest.mark.slow
def test_a_reference_is_of_the_same_config_and_data(results):
    data = open_source(CONFIG.data).identity
    assert find_reference(with_seed(9), data).name == "tiny"
    assert find_reference(CONFIG, {**data, "sha256": "another"}) is None
    assert find_reference(CONFIG, None) is None
    assert find_reference(tiny(), data) is None


@pytest.mark.slow
def test_the_report_shows_the_run_beside_the_reference(results, made, tmp_path):
    page = write_report(made[1][1]).read_text()
    assert "3 runs of results/tiny have" in page
    assert "Shaded: what is expected of 99 of 100 runs." in page
    assert "The loss of held-out images by quarter of t, from little noise to much. Dashed: the reference." in page


@pytest.mark.slow
def test_the_report_of_a_run_without_reference_has_none(made):
    page = write_report(made[1][2]).read_text()
    assert "expected" not in page
    assert "The loss of held-out images by quarter of t, from little noise to much." in page
    assert "Dashed" not in page


# ---- What is shipped


def test_every_shipped_result_is_whole():
    for name, folder in shipped_module.shipped_results().items():
        result = read_result(folder)
        for file, proof in result["files"].items():
            assert fingerprint(folder / file) == proof, (name, file)
        config = from_json(result["config"])
        assert load_run(f"pretrained:{name}").config == config
        assert PARSERS["train"](shlex.split(result["command"])[2:]).config == config
        assert find_reference(config, result["data"]).name == name
        json.dumps(result)


def test_the_training_document_has_the_digits_curve():
    text = (ROOT / "docs" / "training.md").read_text()
    curve = Curve(**read_result(shipped_module.shipped_results()["digits"])["curve"])
    bins = zip(itertools.pairwise(curve.edges), curve.loss, *curve.interval(), strict=True)
    rows = [
        f"| {a + 1:,} to {b:,} | {plain(loss)} | {plain(low)} to {plain(high)} |" for (a, b), loss, low, high in bins
    ]
    assert re.findall(r"^\| [\d,]+ to .* \|$", text, re.MULTILINE) == rows
    typical = [{"step": step, "loss": loss} for step, loss in zip(curve.edges[1:], curve.loss, strict=True)]
    assert f"\n{say_verdict(typical, Reference('digits', curve, {}))}\n" in text
