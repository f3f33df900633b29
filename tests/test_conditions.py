"""Image-conditioned models: the condition is the right one, follows its image everywhere, and is needed by what needs it."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import make_workdir
from PIL import Image
from tiny import experiment, read_images, tiny

from ddpm_jax import Experiment, load_run, train
from ddpm_jax.commands import cli
from ddpm_jax.config import ConfigError, DataConfig
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import epoch_order, make_feed, open_source
from ddpm_jax.data.conditions import CONDITIONS, conditioning_of
from ddpm_jax.data.pictures import PictureError
from ddpm_jax.evaluation.bits import bound_key, make_bound, strata
from ddpm_jax.evaluation.evaluation import Programs, real_places
from ddpm_jax.evaluation.evaluators import SampleGrid
from ddpm_jax.generation.generator import make_generator, sample_key
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.training.footprint import count_params
from ddpm_jax.training.step import init_state, one_step

rng = np.random.default_rng(0)
SMALL = {"ch_mult": (1,), "attn_resolutions": (8,), "dropout": 0.0}
UP = tiny(data={"condition": "downsample2"}, model=SMALL, diffusion={"T": 10, "variance": "fixed_small"})
ONE = jax.devices()[:1]


def mesh():
    return sharding.make_mesh(devices=ONE)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("up") / "run", config=UP)


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir, mesh=mesh())


# ---- What a condition is


def test_downsampling_is_the_mean_of_squares():
    x_0 = rng.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    expected = np.zeros((2, 4, 6, 3))
    for i in range(4):
        for j in range(6):
            expected[:, i, j] = x_0[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(1, 2))
    np.testing.assert_allclose(CONDITIONS["downsample2"](jnp.asarray(x_0)), expected, atol=1e-6)


def test_grey_is_what_pillow_makes_of_a_picture():
    images = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    stored = conditioning_of(DataConfig(image_size=8, condition="grey")).split(images)[1]
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    assert np.abs(np.asarray(stored, int) - expected).max() <= 1


def test_a_smaller_condition_is_brought_to_the_size_as_pillow_does():
    conditioning = conditioning_of(DataConfig(image_size=16, channels=1, condition="downsample2"))
    assert conditioning.shape == (8, 8, 1)
    small = rng.integers(64, 192, (1, 8, 8, 1)).astype(np.uint8)
    lifted = np.asarray(conditioning.to_network(small))[0, ..., 0]
    expected = Image.fromarray((small[0, ..., 0] / 127.5 - 1).astype(np.float32)).resize(
        (16, 16), Image.Resampling.BICUBIC
    )
    np.testing.assert_allclose(lifted[3:-3, 3:-3], np.asarray(expected)[3:-3, 3:-3], atol=1e-5)


def test_a_condition_has_the_values_that_a_file_can_hold():
    """So that conditions given later as pictures are those that the network was trained with, to the last bit."""
    images, conditioning = open_source(UP.data).read(np.arange(20)), experiment(UP).conditioning
    stored = np.asarray(conditioning.split(images)[1])
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(experiment(UP).split(images)[1], conditioning.to_network(stored))


# ---- Pairs


def pair_folders(path, count=5):
    """A folder of RGB pictures and one of grey conditions, with endings and an order of files of their own."""
    images = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    conditions = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    for name in ("images/a", "conditions/a"):
        (path / name).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(images[i]).save(path / f"images/a/{i}.png")
        Image.fromarray(conditions[i, ..., 0]).save(path / f"conditions/a/{i}.{'bmp' if i % 2 else 'png'}")
    Image.fromarray(conditions[0, ..., 0]).save(path / "conditions/one_more.png")
    return images, conditions


def pairs_of(path, **options):
    places = {"source": str(path / "images"), "condition_source": str(path / "conditions")}
    return DataConfig(image_size=8, condition="paired", condition_channels=1, **places, **options)


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_pairs_of_folders_have_the_same_names(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    images, conditions = pair_folders(tmp_path)
    source, places = open_source(pairs_of(tmp_path, cache=cache)), np.array([3, 0, 4])
    np.testing.assert_array_equal(source.rows[places], np.concatenate([images, conditions], axis=-1)[places])
    np.testing.assert_array_equal(source.read(places), images[places])
    Image.fromarray(conditions[0, :4, :4, 0]).save(tmp_path / "conditions/a/2.png")  # another condition: other data
    assert open_source(pairs_of(tmp_path, cache="none")).identity != source.identity


def test_pairs_of_an_npz_file_and_of_two_arrays(tmp_path):
    images = rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    conditions = rng.integers(0, 256, (4, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "both.npz", images=images, conditions=conditions)
    np.save(tmp_path / "conditions.npy", conditions)
    config = DataConfig(str(tmp_path / "both.npz"), 8, condition="paired", condition_channels=1)
    for data in (config, dataclasses.replace(config, condition_source=str(tmp_path / "conditions.npy"))):
        rows = open_source(data).rows
        np.testing.assert_array_equal(rows[np.arange(4)], np.concatenate([images, conditions[..., None]], axis=-1))
    np.save(tmp_path / "conditions.npy", conditions[:3])
    with pytest.raises(UsageError, match="4 images, but there are 3 conditions; give one for each"):
        open_source(data)


def test_pairs_that_are_none_are_refused(tmp_path):
    pair_folders(tmp_path)
    (tmp_path / "conditions/a/3.png").write_bytes((tmp_path / "conditions/a/3.bmp").read_bytes())
    with pytest.raises(UsageError, match="has 2 conditions named a/3; leave one"):
        open_source(pairs_of(tmp_path))
    for name in ("3.png", "3.bmp"):
        (tmp_path / "conditions/a" / name).unlink()
    with pytest.raises(
        UsageError, match=r"has no condition for the image a/3.png, expected a picture named a/3; add it"
    ):
        open_source(pairs_of(tmp_path))
    with pytest.raises(UsageError, match=r"holds no conditions; name them with data.condition_source"):
        open_source(dataclasses.replace(pairs_of(tmp_path), condition_source=""))
    with pytest.raises(UsageError, match="no names in common; give two of one kind"):
        open_source(dataclasses.replace(pairs_of(tmp_path), source="digits", channels=1))


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_condition_of_another_aspect_than_its_image_is_refused_with_both_names(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    pair_folders(tmp_path)
    photo, exif = Image.new("RGB", (12, 8)), Image.Exif()
    for size in ((12, 8), (3, 2), (7, 5), (25, 17)):  # of the condition: the same aspect, rounded
        photo.save(tmp_path / "images/a/3.png")
        Image.new("L", size).save(tmp_path / "conditions/a/3.bmp")
        open_source(pairs_of(tmp_path, cache=cache)).rows[np.array([3])]
    exif[0x0112] = 6
    photo.save(tmp_path / "images/a/3.png", exif=exif)  # turned against its condition, which the cache had decoded
    message = r"condition a/3.bmp does not fit: its 25 x 17 pixels .* the 8 x 12 of the image a/3.png; cut or turn one"
    with pytest.raises(PictureError, match=message):
        open_source(pairs_of(tmp_path, cache=cache)).rows[np.array([3])]


def test_of_several_conditions_of_another_aspect_the_first_is_told(tmp_path, monkeypatch):
    """They can be decoded, so nothing can be listed or left out."""
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    pair_folders(tmp_path)
    for name in ("a/3", "a/1"):
        Image.new("RGB", (8, 24)).save(tmp_path / f"images/{name}.png")
    with pytest.raises(UsageError, match=r"a/1.bmp does not fit: .* \(1 more of \d+ are no good either\)") as refused:
        open_source(pairs_of(tmp_path, cache="auto")).rows[np.array([3])]
    assert "--check" not in str(refused.value)


# ---- Training


@pytest.mark.parametrize("paired", [pytest.param(False, marks=pytest.mark.slow), True])
def test_image_and_condition_are_flipped_and_turned_alike(paired):
    """Each condition after the augmentations is that of its image after them: nearly every image is changed by some."""
    options = {"flip": True, "flip_ud": True, "turn": True}
    config = tiny(data={"condition": "downsample2"}, model=SMALL, train=options)
    rows = open_source(config.data).read(np.arange(16))
    if paired:  # the condition is the image itself
        config = tiny(data={"condition": "paired"}, model=SMALL, train=options)
        rows = np.concatenate([rows, rows], axis=-1)
    trained, seen = experiment(config), []

    def loss(model, x_0, t, eps):
        jax.debug.callback(lambda *arrays: seen.append(arrays), x_0, model(x_0, t))
        return (x_0 * model(x_0, t)).mean(axis=(1, 2, 3))

    class Echo:
        """Gives its condition."""

        def apply(self, variables, x_t, t, condition):
            return condition + 0 * variables["params"]

    trained = dataclasses.replace(trained, loss=loss, network=Echo())
    state = init_state(experiment(config), jax.random.key(0))
    state = dataclasses.replace(
        state, params=jnp.zeros(()), ema_params=jnp.zeros(()), opt_state=trained.optimizer.init(jnp.zeros(()))
    )
    jax.block_until_ready(jax.jit(one_step(trained))(state, rows))
    jax.effects_barrier()
    x_0, condition = seen[0]
    plain = np.asarray(trained.pixels.to_network(rows[..., :1]))
    assert (np.abs(x_0 - plain).max(axis=(1, 2, 3)) > 0).mean() > 0.7
    again = trained.conditioning.split(np.concatenate([trained.pixels.from_network(x_0)] * (1 + paired), axis=-1))[1]
    np.testing.assert_allclose(condition, trained.conditioning.to_network(again), atol=1.1 * 2 / 255)


def test_a_pair_follows_its_image_through_every_feed(tmp_path):
    """Each cache feeds the same rows of the same steps."""
    pair_folders(tmp_path)
    fed = []
    for cache in ("device", "host", "none"):
        config = tiny(data=vars(pairs_of(tmp_path, cache=cache)), model=SMALL, train={"batch_size": 4})
        batches, dataset = make_feed(config, open_source(config.data), mesh())(0, 3)
        fed.append(np.asarray(batches if dataset is None else dataset[batches]))
    np.testing.assert_array_equal(fed[0], fed[1])
    np.testing.assert_array_equal(fed[0], fed[2])


def test_the_first_convolution_takes_the_condition_and_no_other_layer_changes():
    plain, conditional = tiny(model=SMALL), tiny(model=SMALL, data={"condition": "downsample2"})
    shapes = [
        jax.tree.map(lambda a: a.shape, jax.eval_shape(lambda c=c: init_state(experiment(c), jax.random.key(0))).params)
        for c in (plain, conditional)
    ]
    assert shapes[0].pop("conv_in")["kernel"] == (3, 3, 1, 8)
    assert shapes[1].pop("conv_in")["kernel"] == (3, 3, 2, 8)
    assert shapes[0] == shapes[1]
    for config in (conditional, tiny(data={"condition": "paired", "condition_channels": 5}, model=SMALL)):
        state = jax.eval_shape(lambda c=config: init_state(experiment(c), jax.random.key(0)))
        assert count_params(config) == sum(a.size for a in jax.tree.leaves(state.params))


def test_a_network_of_ones_own_is_given_the_condition(run):
    class Echo:
        def init(self, key, x_t, t, condition):
            return {"params": condition.sum()}

        def apply(self, variables, x_t, t, condition):
            return condition

    trained = Experiment.from_config(UP, network=Echo())
    x_t, t, condition = jnp.zeros((3, 8, 8, 1)), jnp.zeros(3, int), jnp.asarray(rng.normal(size=(3, 8, 8, 1)))
    np.testing.assert_array_equal(
        trained.model(trained.init(jax.random.key(0)), condition=condition)(x_t, t), condition
    )
    Echo.apply = lambda self, variables, x_t, t: x_t
    with pytest.raises(
        ConfigError, match="the network Echo takes no condition; give its __call__ the argument condition"
    ):
        Experiment.from_config(UP, network=Echo())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"condition": "grey"}, "data.condition=grey is of RGB images, got data.channels=1; use 3 channels"),
        ({"condition": "downsample8", "image_size": 12}, "needs sides that 8 divides, got images of 12 x 12"),
        ({"condition_channels": 3}, "data.condition_channels=3 is of paired conditions, got data.condition=none"),
        ({"condition_source": "x"}, "data.condition_source=x is of paired conditions"),
        ({"condition": "blue"}, "is not one of none, paired, grey"),
    ],
)
def test_conditions_that_cannot_be_are_refused_in_a_sentence(data, sentence):
    config = tiny(data=data, model=SMALL | {"attn_resolutions": (data.get("image_size", 8),)})
    with pytest.raises(UsageError, match=sentence):
        experiment(config)


# ---- Sampling and evaluation


def test_samples_follow_their_condition_alone(run):
    """Image i depends on (seed, i, condition i): the batch's other conditions change nothing."""
    generate = make_generator(run.experiment, run.mesh, SamplerOptions("ddim", steps=(4,)))
    conditions = rng.integers(0, 256, (4, 4, 4, 1)).astype(np.uint8)
    images = generate(run.params, sample_key(0), np.arange(4), conditions=conditions)
    changed = conditions.copy()
    changed[1] = 255 - changed[1]
    others = generate(run.params, sample_key(0), np.arange(4), conditions=changed)
    kept = [0, 2, 3]
    assert np.abs(np.subtract(images[kept, ...], others[kept, ...], dtype=int)).max() <= 1
    assert np.abs(np.subtract(images[1], others[1], dtype=int)).max() > 5
    alone = generate(run.params, sample_key(0), np.array([2]), conditions=conditions[2:3])
    assert np.abs(np.subtract(alone[0], images[2], dtype=int)).max() <= 1
    with pytest.raises(
        UsageError, match=r"was trained with a condition of each image .data.condition=downsample2.; give one"
    ):
        generate(run.params, sample_key(0), np.arange(4))


@pytest.mark.slow
def test_the_bound_is_that_of_each_image_given_its_own_condition(run):
    from ddpm_jax.diffusion.bound import bound_terms

    images, edges = open_source(UP.data).read(np.arange(4)), strata(10, 9)
    found = make_bound(run.experiment, run.mesh, edges)(run.params, bound_key(0), images, np.arange(4))
    x_0, condition = run.experiment.split(images)
    ts = jnp.tile(jnp.arange(10), (4, 1))
    terms = [
        bound_terms(
            run.experiment.process,
            lambda x_t, t, c=c: run.experiment.model(run.params, condition=c)(x_t, t),
            bound_key(0),
            x_0,
            jnp.arange(4),
            ts,
            clip=True,
        ).bits
        for c in (condition, condition[::-1])
    ]
    np.testing.assert_allclose(found["bits"], terms[0], rtol=1e-4, atol=1e-6)
    assert not np.allclose(found["bits"], terms[1], rtol=1e-3)


def test_the_grid_shows_each_condition_beside_its_sample(run):
    source, programs = open_source(UP.data), Programs(run.experiment, run.mesh, SamplerOptions("ddim", steps=(2,)))
    state = init_state(run.experiment, jax.random.key(0))
    programs.experiment = dataclasses.replace(
        run.experiment,
        config=dataclasses.replace(UP, train=dataclasses.replace(UP.train, sample_every=4, ema_decay=0.0)),
    )
    sheet = SampleGrid(programs, source)(dataclasses.replace(state, step=jnp.asarray(4))).pictures["samples"][0]
    first, second = 0, len(source) // 4
    for place, image in ((0, first), (9, second)):
        condition = run.experiment.split(source.read(np.array([image])))[1]
        expected = np.asarray(run.experiment.pixels.from_network(condition))[0]
        np.testing.assert_array_equal(sheet[:8, place : place + 8], expected)
    assert sheet.shape == (17, 17 + 4 + 17, 1)


# ---- Commands


def command(name, *words):
    """Runs a command with a command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command.py", *map(str, words)])
        cli.prepare(name)()


@pytest.fixture(scope="module")
def conditions(tmp_path_factory):
    """Three 4x4 conditions, as pictures."""
    folder = tmp_path_factory.mktemp("given")
    images = rng.integers(0, 256, (3, 4, 4)).astype(np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder, images[..., None]


FEW = ("--sampler", "ddim", "--steps", "3")


def test_sample_draws_one_image_of_each_condition_in_order(workdir, run, conditions, tmp_path):
    folder, images = conditions
    command("sample", workdir, "--conditions", folder, *FEW, "--out", tmp_path / "out")
    found = read_images(tmp_path / "out/images.npz")
    generate = make_generator(run.experiment, run.mesh, SamplerOptions("ddim", steps=(3,)))
    expected = generate(run.params, sample_key(0), np.arange(3), conditions=images)
    assert np.abs(np.subtract(found, expected, dtype=int)).max() <= 1
    # More of them take the conditions in turn, and a part of a set is that part; of an .npz file too.
    np.savez(tmp_path / "given.npz", images=np.zeros((1, 1, 1), np.uint8), conditions=images)
    options = ("--conditions", tmp_path / "given.npz", "--num-images", 2, "--first-image", 4)
    command("sample", workdir, *options, *FEW, "--out", tmp_path / "more")
    expected = generate(run.params, sample_key(0), np.array([4, 5]), conditions=images[[1, 2]])
    assert np.abs(np.subtract(read_images(tmp_path / "more/images.npz"), expected, dtype=int)).max() <= 1


def test_a_set_of_other_conditions_is_another_set(workdir, conditions, tmp_path):
    folder, images = conditions
    np.save(tmp_path / "given.npy", images)
    command("sample", workdir, "--conditions", tmp_path / "given.npy", *FEW, "--out", tmp_path / "out")
    command("sample", workdir, "--conditions", folder, *FEW, "--out", tmp_path / "out")  # the same values
    np.save(tmp_path / "given.npy", images ^ np.uint8(1))
    with pytest.raises(UsageError, match="holds another set of images, which differs in given"):
        command("sample", workdir, "--conditions", tmp_path / "given.npy", *FEW, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, r"the run draws an image of a condition .data.condition=downsample2.; give these by --conditions"),
        ("nowhere", r"--conditions \S*nowhere does not exist"),
        ("larger.npy", r"--conditions \S*larger.npy has images of shape .8, 8, 1., but .* say .4, 4, 1."),
        ("rgb.npy", r"--conditions \S*rgb.npy has images of shape .4, 4, 3."),
    ],
)
def test_conditions_that_do_not_fit_are_refused_in_a_sentence(workdir, tmp_path, given, sentence):
    np.save(tmp_path / "larger.npy", np.zeros((2, 8, 8, 1), np.uint8))
    np.save(tmp_path / "rgb.npy", np.zeros((2, 4, 4, 3), np.uint8))
    options = [] if given is None else ["--conditions", tmp_path / given]
    with pytest.raises(UsageError, match=sentence) as refused:
        command("sample", workdir, *options, "--out", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_conditions_for_a_run_without_are_refused(tmp_path, conditions):
    plain = make_workdir(tmp_path / "plain")
    with pytest.raises(UsageError, match="--conditions needs a run with conditions, but this one has none"):
        command("sample", plain, "--conditions", conditions[0])


@pytest.mark.slow
def test_a_run_is_trained_continued_and_evaluated(tmp_path):
    """Stopped and continued it ends bit-identical, with the loss, the bound and the FID of held-out pairs on the way."""
    images, small = open_source(UP.data).read(np.arange(60)), SMALL | {"ch": 8}
    np.savez(tmp_path / "train.npz", images=images[:40], conditions=255 - images[:40])
    np.savez(tmp_path / "test.npz", images=images[40:], conditions=255 - images[40:])
    options = {"steps": 4, "batch_size": 8, "save_every": 2, "log_every": 2, "sample_every": 4, "eval_every": 4}
    held_out = {
        "eval_source": str(tmp_path / "test.npz"),
        "eval_images": 8,
        "eval_samples": 8,
        "eval_features": "pixels",
    }
    data = {"source": str(tmp_path / "train.npz"), "condition": "paired"}
    config = tiny(data=data, model=small, diffusion={"T": 4}, train=options | held_out)
    whole = train(experiment(config), tmp_path / "whole")
    train(
        experiment(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2, eval_every=2))),
        tmp_path / "parts",
    )
    parts = train(experiment(config), tmp_path / "parts")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").read_text().splitlines()]
    assert {"eval_loss", "eval_bits_per_dim", "eval_fid"} <= set().union(*lines)
    metrics = ("--metrics", "losses", "nll", "fid", "--features", "pixels", "--num-real", 8, "--batch-size", 8)
    command("evaluate", tmp_path / "parts", *metrics, "--source", tmp_path / "test.npz", *FEW)
    (nll,) = (json.loads(path.read_text()) for path in (tmp_path / "parts/evaluation").glob("nll-*.json"))
    assert np.isfinite(nll["value"])
    assert (tmp_path / "parts/evaluation/figures/progressive-00000004.png").exists()


@pytest.mark.slow
def test_an_exported_program_takes_the_conditions(workdir, run, tmp_path):
    command("convert", "export", workdir, tmp_path / "up.jax_export")
    program = jax.export.deserialize(bytearray((tmp_path / "up.jax_export").read_bytes()))
    conditions = rng.integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)
    images = program.call(jnp.uint32(7), jnp.arange(3, dtype=jnp.int32), jnp.asarray(conditions))
    expected = make_generator(run.experiment, run.mesh)(run.params, sample_key(7), np.arange(3), conditions=conditions)
    assert np.abs(np.subtract(images, expected, dtype=int)).max() <= 1


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "to-diffusers", "RUN", "NEW"),
        ("convert", "to-result", "RUN", "NEW"),
        ("benchmark", "RUN", "--samplers", "ddim", "--steps", "2"),
    ],
)
def test_what_knows_no_conditions_says_so(workdir, tmp_path, words):
    name, *others = [{"RUN": workdir, "NEW": tmp_path / "new"}.get(word, word) for word in words]
    with pytest.raises(
        UsageError, match=r"knows no conditions, and this network has them .data.condition=downsample2."
    ):
        command(name, *others)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_psnr_is_of_the_images_whose_conditions_the_samples_have(workdir, run):
    """Against samples drawn here and ratios by their definition, on the scale of 0 to 255."""
    options = ("--metrics", "psnr", "--num-real", 4, "--num-images", 8, "--batch-size", 8, *FEW, "--no-figures")
    command("evaluate", workdir, "--features", "pixels", *options)
    (result,) = (json.loads(path.read_text()) for path in (workdir / "evaluation").glob("psnr-*.json"))
    order, source = np.tile(epoch_order(0, 0, 4), 2), open_source(UP.data)
    images = source.read(real_places(len(source), 4))
    generate = make_generator(run.experiment, run.mesh, SamplerOptions("ddim", steps=(3,)))
    conditions = np.asarray(run.experiment.conditioning.split(images)[1])[order]
    samples = np.asarray(generate(run.params, sample_key(0), np.arange(8), conditions=conditions), float)

    def psnr(a, b):
        return (10 * np.log10(255**2 / ((a - b) ** 2).mean(axis=(1, 2, 3)))).mean()

    real = images[order].astype(float)
    assert result["value"] == pytest.approx(psnr(samples, real), abs=0.05)
    assert result["mean_of_samples"]["value"] == pytest.approx(
        psnr((samples[:4] + samples[4:]) / 2, real[:4]), abs=0.05
    )
    lifted = run.experiment.pixels.from_network(run.experiment.split(images)[1])
    assert result["condition"]["value"] == pytest.approx(psnr(np.asarray(lifted, float), images), abs=0.01)


def test_psnr_of_a_run_without_conditions_is_refused(tmp_path):
    with pytest.raises(
        UsageError, match="psnr compares samples with the images of their conditions, and this run has none"
    ):
        command("evaluate", make_workdir(tmp_path / "plain"), "--metrics", "psnr", "--no-figures")
