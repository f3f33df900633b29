"""Images that are neither square nor grey or RGB nor of 8 bits: they train, continue, sample, are exported and evaluated."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from etils import epath
from interop import run_script
from PIL import Image
from tiny import experiment, one_device, tiny

from ddpm_jax import load_run
from ddpm_jax.commands.arguments import PARSERS
from ddpm_jax.commands.convert import classifier
from ddpm_jax.commands.train import train
from ddpm_jax.config import Config, DataConfig, check, fixed_fields, from_json, to_json
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import cache, open_source
from ddpm_jax.data.sheets import enlarge, grid
from ddpm_jax.evaluation.evaluation import Evaluation, Options
from ddpm_jax.evaluation.features import Features, check_pictures, of_pictures
from ddpm_jax.evaluation.metrics import evaluate
from ddpm_jax.generation.image_set import choose_format, generate_set
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.interop.card import model_card
from ddpm_jax.interop.result import first_samples

ROOT = Path(__file__).parent.parent
SHAPE, RANGE = (12, 16, 4), (-2.0, 5.0)
FEW = ("--sampler", "ddim", "--steps", 4, "--batch-size", 8)


def waves(count):
    """Smooth images of float32, with values all over the range."""
    y, x = np.mgrid[:12, :16] / 4
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, (count, 1, 1, 4))
    values = np.sin(y[None, :, :, None] + x[None, :, :, None] * np.arange(1, 5) / 2 + phases)
    return (1.5 + 3.5 * values).astype(np.float32).clip(*RANGE)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "waves.npy"
    np.save(path, waves(24))
    return tiny(
        data={"source": str(path), "image_size": SHAPE[:2], "channels": 4, "value_range": RANGE},
        model={"ch_mult": (1,), "attn_resolutions": (12,)},
        diffusion={"T": 8},
        train={"steps": 8, "batch_size": 8, "log_every": 2, "sample_every": 8, "save_every": 4, "flip_ud": True}
        | {"eval_every": 8, "eval_source": str(path), "eval_samples": 4, "eval_features": "pixels"},
    )


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "waves"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield workdir, jax.device_get(train(experiment(config), workdir, mesh=one_device()))


@pytest.fixture(scope="module")
def run(trained):
    return load_run(trained[0], mesh=sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def sampled(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "set"
    run_script("sample", trained[0], "--num-images", 12, "--out", out, "--animation", *FEW)
    return out


@pytest.mark.slow
def test_it_continues_bit_for_bit(config, trained, tmp_path):
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
    train(experiment(half), tmp_path / "run", mesh=one_device())
    again = jax.device_get(train(experiment(config), tmp_path / "run", mesh=one_device()))
    for a, b in zip(*map(jax.tree.leaves, (again, trained[1])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_it_is_measured_on_the_way_without_bits_per_dim(trained):
    lines = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    (measured,) = [line for line in lines if "eval_loss" in line]
    assert {"eval_loss_quarter_1", "eval_fid"} <= set(measured)
    assert not {name for name in measured if "bits" in name}
    with Image.open(trained[0] / "samples" / "step_00000008.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.slow
def test_samples_are_float32_in_one_npy_with_a_grid_of_their_first_three_channels(sampled):
    assert {path.name for path in sampled.iterdir()} == {"images.npy", "grid.png", "set.json", "process.webp"}
    images = np.load(sampled / "images.npy")
    assert (images.dtype, images.shape) == (np.float32, (12, *SHAPE))
    assert RANGE[0] <= images.min() < images.max() <= RANGE[1]
    inside = images[(images > RANGE[0]) & (images < RANGE[1])]
    assert len(np.unique(inside)) > 0.5 * len(inside) > 256  # not rounded on the way
    levels = np.round((images[..., :3] - RANGE[0]) / (RANGE[1] - RANGE[0]) * 255)
    shown = np.asarray(Image.open(sampled / "grid.png")).astype(int)
    assert np.abs(shown - enlarge(grid(levels.astype(np.uint8)))).max() <= 1


@pytest.mark.slow
def test_image_i_does_not_depend_on_its_batch(run, sampled, tmp_path):
    options = SamplerOptions(sampler="ddim", steps=(4,))
    generate_set(run, epath.Path(tmp_path / "o"), range(9, 10), seed=0, options=options, batch_size=1, format="npy")
    alone, among = np.load(tmp_path / "o" / "images.npy")[0], np.load(sampled / "images.npy")[9]
    np.testing.assert_allclose(alone, among, atol=(RANGE[1] - RANGE[0]) / 255)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["npy", "npz", "shards"])
def test_a_set_that_is_damaged_is_made_again_bit_for_bit(format, run, tmp_path):
    def generate():
        options = SamplerOptions(sampler="ddim", steps=(2,))
        generate_set(run, epath.Path(tmp_path), range(6), seed=0, options=options, batch_size=4, format=format)

    def content():
        return {str(path): path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    generate()
    whole = content()
    for path in (tmp_path / "grid.png", next(tmp_path.rglob("*.np[yz]"))):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        assert content() != whole
        generate()
        assert content() == whole


@pytest.mark.slow
def test_pngs_of_them_are_refused(trained, tmp_path):
    for format in ("png", "both"):
        with pytest.raises(UsageError, match=f"--format {format} writes PNG, .* these are float32 of 4 channel"):
            run_script("sample", trained[0], "--format", format, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_format_is_both_for_what_png_holds_and_else_npy():
    assert [choose_format(experiment(tiny(data={"channels": c})), None) for c in (1, 2, 3, 4)] == [
        "both",
        "npy",
        "both",
        "npy",
    ]
    two = experiment(tiny(data={"channels": 2}))
    assert [choose_format(two, format) for format in ("npy", "npz", "shards")] == ["npy", "npz", "shards"]
    with pytest.raises(UsageError, match=r"these are uint8 of 2 channel\(s\); use --format npy, npz or shards"):
        choose_format(two, "png")
    assert choose_format(experiment(tiny()), "npy") == "npy"


@pytest.mark.slow
def test_exported_parameters_and_sampler_are_the_runs(trained, run, tmp_path):
    run_script("convert", "export", trained[0], tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert from_json(json.loads(file.metadata()["config"])) == run.config
        assert sum(file.get_tensor(name).size for name in file.keys()) == sum(map(np.size, jax.tree.leaves(run.params)))  # noqa: SIM118
    run_script("convert", "export", trained[0], tmp_path / "x.jax_export")
    program = jax.export.deserialize(bytearray((tmp_path / "x.jax_export").read_bytes()))
    images = np.asarray(program.call(np.uint32(3), np.arange(2, dtype=np.int32)))
    assert images.dtype == np.float32
    options = SamplerOptions()
    generate_set(run, epath.Path(tmp_path / "o"), range(2), seed=3, options=options, batch_size=2, format="npy")
    np.testing.assert_allclose(images, np.load(tmp_path / "o" / "images.npy"), atol=(RANGE[1] - RANGE[0]) / 255)


@pytest.mark.slow
def test_a_result_shows_them_as_pictures_and_a_classifier_of_them_is_refused(trained, run, tmp_path):
    pictures = first_samples(run)
    assert (pictures.dtype, pictures.shape) == (np.uint8, (64, *SHAPE))
    assert len(np.unique(pictures)) > 100  # the whole range, not floats cut to whole numbers
    with pytest.raises(UsageError, match="the classifier is of 8-bit images"):
        classifier(str(trained[0]), str(tmp_path / "c.jax_export"), "", 1)


@pytest.mark.slow
def test_the_model_card_says_how_to_get_their_values(run, trained):
    card = model_card(run, trained[0], title="waves")
    assert "of 12x16 images with 4 channel(s)" in card
    assert 'output_type="np").images' in card
    assert "The images are float32 in [0, 1], which stands for values from -2 to 5." in card


@pytest.mark.slow
def test_it_is_evaluated_by_pixels_and_reported(trained, capsys):
    options = ("--num-images", 4, "--num-real", 8, "--batch-size", 4, "--sampler", "ddim", "--steps", 2)
    run_script("evaluate", trained[0], "--features", "pixels", *options)
    told = capsys.readouterr().out
    assert "fid: " in told
    assert "bits/dim" not in told
    report = (trained[0] / "report.html").read_text()
    assert "12\u00d716 4 channels, float32 in [-2, 5]" in report


@pytest.mark.slow
def test_nearest_real_images_are_found_by_their_own_values(run, trained, config, tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path))
    features = Features("none", lambda images: {"features": np.zeros((len(images), 1))})
    evaluation = Evaluation.of_run(
        run, trained[0], features, Options(num_images=4, batch_size=4), SamplerOptions("ddim", (2,))
    )
    (found,) = [r["pixels"] for r in [evaluate(evaluation, ("nearest",))["nearest"]["nearest"]]]
    samples, real = (a.reshape(len(a), -1) for a in (evaluation.first_samples(), open_source(config.data).images))
    distances = np.sqrt((((samples[:, None] - real[None]) / 3.5) ** 2).sum(-1))  # in [-1, 1]
    np.testing.assert_array_equal(found["places"], np.argsort(distances, axis=1)[:, :8])
    np.testing.assert_allclose(found["distances"], np.sort(distances, axis=1)[:, :8], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["nll", "rate-distortion"])
def test_bits_per_dim_are_refused(metric, trained):
    with pytest.raises(UsageError, match=r"^bits/dim .* are of 8-bit images, .*leave out these metrics$"):
        run_script("evaluate", trained[0], "--metrics", metric, "--features", "pixels")


@pytest.mark.slow
def test_inception_takes_pictures_and_renderings_of_them(config, run):
    with pytest.raises(UsageError, match="Inception takes grey or RGB images, and these have 4 channels"):
        check_pictures(run.experiment)
    seen = []
    features = of_pictures(Features("x", lambda images: seen.append(images) or {}), run.experiment.pixels)
    features.compute(np.array([[-2.0, 5.0]], np.float32))
    assert seen[0].dtype == np.uint8
    assert seen[0].tolist() == [[0, 255]]
    assert features.name == "x, of 8-bit pictures"


# ---- Pictures of another aspect, and of 16 bits


def photos(folder, size, mode="RGB"):
    """A folder of four pictures of noise, of values far enough from the ends for the filter."""
    folder.mkdir()
    for i in range(4):
        values = np.random.default_rng(i).uniform(0.25, 0.75, (*size, 3) if mode == "RGB" else size)
        values = (values * 255).astype(np.uint8) if mode == "RGB" else (values * 65535).astype(np.uint16)
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_a_folder_of_photos_trains_at_their_aspect(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    folder = photos(tmp_path / "photos", (32, 48))
    (tmp_path / "small.py").write_text(
        "from tiny import tiny\nconfig = tiny(model={'ch_mult': (1,), 'attn_resolutions': (8,)}, "
        "train={'steps': 2, 'save_every': 2, 'log_every': 2, 'batch_size': 8})\n"
    )
    options = ("--data.source", folder, "--data.image-size", 8, 12, "--data.channels", 3)
    run_script("train", tmp_path / "small.py", "--workdir", tmp_path / "run", *options)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["image_size"] == [8, 12]
    run_script("train", tmp_path / "small.py", "--workdir", tmp_path / "run", *options)  # the same command goes on
    run_script("sample", tmp_path / "run", "--num-images", 8, "--out", tmp_path / "out")
    with np.load(tmp_path / "out" / "images.npz") as arrays:
        assert arrays["images"].shape == (8, 8, 12, 3)
    with Image.open(tmp_path / "out" / "000003.png") as picture:
        assert picture.size == (12, 8)


def test_16_bit_pictures_are_decoded_once_or_at_every_step_to_the_same_floats(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    folder = photos(tmp_path / "photos", (10, 15), mode="I;16")
    data = DataConfig(source=str(folder), image_size=(8, 12), channels=1, value_range=(0, 65535), cache="none")
    decoded, places = open_source(data), np.arange(4)
    cached = open_source(dataclasses.replace(data, cache="host"))
    assert isinstance(cached.images, np.ndarray)
    assert cached.images.dtype == decoded.images.dtype == np.float32
    np.testing.assert_array_equal(cached.read(places), decoded.read(places))
    assert len(np.unique(cached.images % 256)) > 200  # the low bytes are there
    # The same pictures as 8-bit images are another file of the cache.
    of_8_bits = open_source(dataclasses.replace(data, value_range=None, cache="host"))
    assert of_8_bits.images.dtype == np.uint8
    assert np.abs(of_8_bits.images - cached.images / 257).max() < 2
    assert len(list((cache.cache_folder() / "decoded").glob("*.npy"))) == 2


@pytest.mark.parametrize(("channels", "value_range"), [(4, None), (2, None), (3, (0, 65535))])
def test_pictures_of_other_channels_are_refused(channels, value_range, tmp_path):
    folder = photos(tmp_path / "photos", (8, 8))
    message = (
        rf"^data.channels={channels}, but pictures give 1 \(grey\) or 3 \(RGB\), and 1 with data.value_range; use one"
    )
    with pytest.raises(UsageError, match=message):
        open_source(DataConfig(source=str(folder), image_size=8, channels=channels, value_range=value_range))


@pytest.mark.parametrize(("dtype", "value_range"), [(np.uint8, None), (np.float32, (0.0, 300.0))])
def test_pages_of_tiff_files_are_channels(dtype, value_range, tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (5, 4, 8, 8)).astype(dtype)
    for i, (first, *rest) in enumerate(arrays):
        more = [Image.fromarray(page) for page in rest]
        Image.fromarray(first).save(tmp_path / f"{i}.tif", save_all=True, append_images=more)
    data = DataConfig(source=str(tmp_path), image_size=8, channels=4, value_range=value_range, cache="none")
    images = open_source(data).read(np.arange(5))
    assert images.dtype == dtype
    np.testing.assert_array_equal(images, arrays.transpose(0, 2, 3, 1))


# ---- Configs


def test_the_commands_of_the_document_can_be_parsed(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^python train\.py (.*--data.*)$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    configs = [PARSERS["train"](line.split()).config for line in lines]
    assert [experiment(config).image_shape for config in configs] == [(64, 96, 3), (64, 64, 4), (64, 64, 1)]


def test_one_number_stays_one_number_and_two_equal_ones_become_it():
    assert to_json(Config())["data"]["image_size"] == 32
    two = Config(data=DataConfig(image_size=(32, 32)))
    assert two == Config()
    assert json.dumps(fixed_fields(two)) == json.dumps(fixed_fields(Config()))


def test_height_and_width_survive_json():
    config = tiny(data={"image_size": (8, 12), "value_range": (-1, 1.5)})
    assert check(config) == []
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    assert experiment(again).image_shape == (8, 12, 1)


def test_a_config_of_an_earlier_version_means_8_bits_and_no_new_augmentation():
    values = to_json(tiny())
    for section, name in (("data", "value_range"), ("train", "flip_ud"), ("train", "turn")):
        del values[section][name]
    assert from_json(json.loads(json.dumps(values))) == tiny()
