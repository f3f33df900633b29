"""Sampling from given pictures: noised ones, ones with holes, and between two; what is given decides the set."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import CONFIG, make_workdir
from PIL import Image
from tiny import read_images

from ddpm_jax import Experiment, load_run, make_sampler
from ddpm_jax.commands import cli
from ddpm_jax.core import rng, sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.rng import Purpose
from ddpm_jax.data import open_source
from ddpm_jax.diffusion.ode import ode_bits_per_dim, ode_log_density
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.evaluation.flow import flow_keys, make_flow_bits
from ddpm_jax.generation import image_set
from ddpm_jax.generation.generator import sample_key
from ddpm_jax.sampling import reverse
from ddpm_jax.sampling.inpainting import inpaint
from ddpm_jax.sampling.latents import interpolate, make_chain

T = CONFIG.diffusion.T
PICTURES = open_source(CONFIG.data).read(np.arange(5))


def command(name, *words):
    """Runs a command with a command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command.py", *map(str, words)])
        cli.prepare(name)()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Pictures as a folder, and masks of the right size: a half, a soft one, one of another size."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "pictures").mkdir()
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture[..., 0]).save(folder / f"pictures/{i}.png")
    half = np.zeros((8, 8), np.uint8)
    half[:, :4] = 255
    soft, large = half.copy(), half.repeat(2, axis=0).repeat(2, axis=1)
    soft[3, 4] = 100
    for name, mask in (("half", half), ("soft", soft), ("large", large)):
        Image.fromarray(mask).save(folder / f"{name}.png")
    np.save(folder / "larger.npy", np.zeros((2, 16, 16, 1), np.uint8))
    np.save(folder / "rgb.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save(folder / "masks.npy", np.zeros((3, 8, 8), np.uint8))
    return folder


def chain_of(run, *options):
    return make_chain(
        make_sampler(run.experiment.process, *options), run.model, sample_key(0), image_shape=run.experiment.image_shape
    )


def close(found, x, run):
    expected = np.asarray(run.experiment.pixels.from_network(x))
    return np.abs(np.subtract(found, expected, dtype=int)).max() <= 1


X_0 = jnp.asarray(PICTURES, jnp.float32) / 127.5 - 1


def test_from_images_is_sdedit_of_each_picture_in_order(workdir, run, given, tmp_path):
    command("sample", workdir, "--from-images", given / "pictures", "--noise-level", 0.4, "--out", tmp_path / "out")
    images = read_images(tmp_path / "out/images.npz")
    assert len(images) == 5
    (expected,) = interpolate(
        chain_of(run), run.experiment.process.schedule, jnp.arange(5), X_0, X_0, t=3, fractions=(0.0,)
    )
    assert close(images, expected, run)
    assert np.abs(images - np.asarray(PICTURES, int)).max() > 5
    # Image 6 is picture 1 with the noise of image 6, alone as in a set.
    one = ("--first-image", 6, "--num-images", 1)
    command(
        "sample", workdir, "--from-images", given / "pictures", "--noise-level", 0.4, *one, "--out", tmp_path / "one"
    )
    x_0 = X_0[1:2]
    (again,) = interpolate(
        chain_of(run), run.experiment.process.schedule, jnp.array([6]), x_0, x_0, t=3, fractions=(0.0,)
    )
    assert close(read_images(tmp_path / "one/images.npz"), again, run)


@pytest.mark.parametrize(
    "sampler", ["dpm++2m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddim", "heun"))]
)
def test_from_images_takes_every_sampler(workdir, run, given, tmp_path, sampler):
    """One that looks back starts anew at the level: it is the sampler of the steps below."""
    options = ("--from-images", given / "pictures", "--sampler", sampler, "--steps", 5, "--spacing", "leading")
    command("sample", workdir, *options, "--noise-level", 0.5, "--out", tmp_path / "out")
    process = run.experiment.process
    below = make_sampler(process, sampler, steps=5, spacing="leading", highest=4)  # of 0, 2, 4, 6, 8
    assert below.rows["t"].max() == 4
    x_t = q_sample(
        process.schedule,
        X_0,
        jnp.full(5, 4),
        rng.image_normal(rng.image_keys(sample_key(0), jnp.arange(5)), 0, (8, 8, 1)),
    )
    assert close(
        read_images(tmp_path / "out/images.npz"), reverse(below, run.model, sample_key(0), jnp.arange(5), x_t)[0], run
    )


def test_inpainting_keeps_what_the_mask_keeps_and_fills_in_the_rest(workdir, run, given, tmp_path):
    walk = ("--inpaint-jump", 2, "--inpaint-times", 2)
    command(
        "sample",
        workdir,
        "--inpaint",
        given / "pictures",
        "--mask",
        given / "half.png",
        *walk,
        "--out",
        tmp_path / "out",
    )
    images, mask = read_images(tmp_path / "out/images.npz"), np.zeros((1, 8, 8, 1))
    mask[:, :, :4] = 1
    np.testing.assert_array_equal(images[:, :, :4], PICTURES[:, :, :4])
    sampler = inpaint(run.experiment.process, np.arange(T), X_0, jnp.asarray(mask), jump=2, times=2)
    x_T = rng.image_normal(rng.image_keys(sample_key(0), jnp.arange(5)), 0, (8, 8, 1))
    assert close(images, reverse(sampler, run.model, sample_key(0), jnp.arange(5), x_T)[0], run)


@pytest.mark.slow
def test_interpolation_is_figure_8_between_pictures_and_numbers_of_the_data(workdir, run, given, tmp_path):
    ends = (given / "pictures/2.png", 4)
    command(
        "sample", workdir, "--interpolate", *ends, "--num-images", 5, "--noise-level", 0.7, "--out", tmp_path / "out"
    )
    schedule, fractions = run.experiment.process.schedule, np.linspace(0, 1, 5).tolist()
    expected = interpolate(chain_of(run), schedule, jnp.arange(1), X_0[2:3], X_0[4:5], t=6, fractions=fractions)
    assert close(read_images(tmp_path / "out/images.npz"), expected[:, 0], run)


def test_a_set_is_continued_and_other_pictures_make_another(workdir, given, tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", PICTURES)
    options = (
        "--from-images",
        tmp_path / "x.npy",
        "--batch-size",
        8,
        "--num-images",
        24,
        "--sampler",
        "ddim",
        "--steps",
        2,
    )
    command("sample", workdir, *options, "--out", tmp_path / "whole")

    def stopped(self, part, images):
        if part.start == 8:
            raise KeyboardInterrupt
        real(self, part, images)
        self.wait()

    real = image_set.ImageSet.add
    with monkeypatch.context() as patch:
        patch.setattr(image_set.ImageSet, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            command("sample", workdir, *options, "--out", tmp_path / "parts")
    assert len([*(tmp_path / "parts/parts").iterdir()]) == 1
    command("sample", workdir, *options, "--out", tmp_path / "parts")
    assert (tmp_path / "parts/images.npz").read_bytes() == (tmp_path / "whole/images.npz").read_bytes()
    np.save(tmp_path / "x.npy", PICTURES ^ np.uint8(1))
    with pytest.raises(UsageError, match="holds another set of images, which differs in given"):
        command("sample", workdir, *options, "--out", tmp_path / "parts")
    np.save(tmp_path / "x.npy", PICTURES)
    with pytest.raises(UsageError, match="which differs in given"):
        command("sample", workdir, *options, "--noise-level", 0.6, "--out", tmp_path / "parts")
    command("sample", workdir, *options, "--out", tmp_path / "parts")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--from-images nowhere", r"--from-images \S*nowhere does not exist"),
        ("--from-images larger.npy", r"--from-images \S*larger.npy has images of shape .16, 16, 1."),
        ("--from-images rgb.npy", r"--from-images \S*rgb.npy has images of shape .8, 8, 3."),
        ("--from-images pictures --noise-level 0", "--noise-level 0 is outside of 0 to 1; give a share"),
        ("--from-images pictures --noise-level 1.5", "--noise-level 1.5 is outside of 0 to 1"),
        (
            "--from-images pictures --noise-level 0.1 --sampler ddim --steps 2 --spacing trailing",
            "--noise-level 0.1 is below the sampler's steps",
        ),
        ("--noise-level 0.3", "--noise-level has no effect without --from-images or --interpolate"),
        ("--from-images pictures --interpolate 1 2", "--from-images and --interpolate exclude each other"),
        ("--inpaint pictures", "--inpaint and --mask go together; give both"),
        ("--mask half.png", "--inpaint and --mask go together; give both"),
        (
            "--inpaint pictures --mask soft.png",
            r"soft.png is soft: mask 0 has the value 100, expected 255 .kept. and 0",
        ),
        (
            "--inpaint pictures --mask large.png",
            r"a mask of 16 x 16 pixels .\S*large.png., but the run's images have 8 x 8",
        ),
        ("--inpaint pictures --mask masks.npy", "masks.npy has 3 masks for 5 pictures; give one, or one for each"),
        ("--inpaint pictures --mask nowhere", r"--mask \S*nowhere does not exist"),
        ("--inpaint pictures --mask half.png --sampler ddim", "--inpaint is of ancestral sampling, got --sampler ddim"),
        (
            "--inpaint pictures --mask half.png --inpaint-jump 10",
            "got jump = 10 with 10 steps, .*; change --inpaint-jump",
        ),
        ("--interpolate pictures 1", r"--interpolate \S*pictures has 5 pictures; give one"),
        ("--interpolate 1 5000", "--interpolate 5000 is no image of the run's data, which has 0 to 1796"),
        (
            "--interpolate 1 2 --first-image 3",
            "--interpolate draws all of its images together; leave out --first-image",
        ),
        ("--from-images pictures --animation", "--animation shows the reverse process from noise alone"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(workdir, given, tmp_path, words, sentence):
    names = {path.name: path for path in given.iterdir()} | {"nowhere": given / "nowhere"}
    with pytest.raises(UsageError, match=sentence) as refused:
        command("sample", workdir, *(names.get(word, word) for word in words.split()), "--out", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


# ---- The ODE's likelihood from the command line


class Linear:
    """eps = x_t / 2, which compiles at once."""

    def init(self, key, x_t, t):
        return {"params": jnp.asarray(0.5)}

    def apply(self, variables, x_t, t):
        return variables["params"] * x_t


@pytest.mark.slow
def test_ode_nll_is_that_of_each_image_alone():
    """Against the library, on one image of a batch: its steps and draws are its own."""
    pytest.importorskip("diffrax", reason="needs the extra `ode`: pip install -e .[ode]")
    trained, params = Experiment.from_config(CONFIG, network=Linear()), jnp.asarray(0.5)
    one = sharding.make_mesh(devices=jax.devices()[:1])
    found = make_flow_bits(trained, one)(params, flow_keys(3), PICTURES[:3], np.array([5, 6, 7]))
    root = rng.root_key(3)
    dequantise = rng.image_keys(rng.stream(root, Purpose.DEQUANTISE), jnp.array([6]))
    noise = jax.random.uniform(dequantise[0], (8, 8, 1), jnp.float32, -1 / 255, 1 / 255)
    direction, x = rng.stream(root, Purpose.FLOW), X_0[1:2] + noise[None]
    likelihood = ode_log_density(trained.process, trained.model(params), direction, jnp.array([6]), x)
    np.testing.assert_allclose(found["bits"][1], ode_bits_per_dim(likelihood)[0], rtol=1e-4)
    assert not np.isclose(found["bits"][0], found["bits"][1], rtol=1e-3)


@pytest.mark.slow
def test_evaluate_computes_ode_nll(workdir):
    pytest.importorskip("diffrax", reason="needs the extra `ode`: pip install -e .[ode]")
    words = ("--metrics", "ode-nll", "--num-real", 8, "--batch-size", 8, "--no-figures", "--features", "pixels")
    command("evaluate", workdir, *words)
    (result,) = (json.loads(path.read_text()) for path in (workdir / "evaluation").glob("ode-nll-*.json"))
    assert result["unit"] == "bits/dim"
    assert np.isfinite(result["value"])
    assert result["evaluations"] > 10
