"""Runs with classes: labels follow their images, and every promise of other runs holds."""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image
from test_cli import refused  # noqa: F401  fixtures
from test_interop_diffusers import drawn_peer
from test_training import assert_metrics_agree, equal
from test_training import run as trained
from tiny import experiment, one_device, tiny

from ddpm_jax import train
from ddpm_jax.commands import convert
from ddpm_jax.commands.train import _open_data, data_notes
from ddpm_jax.config import ConfigError
from ddpm_jax.core import rng, sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.rng import Purpose
from ddpm_jax.data import Source, batch_indices, make_feed, open_source
from ddpm_jax.data.pixels import from_uint8
from ddpm_jax.data.sheets import class_grid, enlarge, grid
from ddpm_jax.data.sources import without_shared_folders
from ddpm_jax.diffusion.bound import bits_per_dim
from ddpm_jax.evaluation.digits import agreement
from ddpm_jax.evaluation.evaluation import Evaluation, Programs
from ddpm_jax.evaluation.evaluators import open_held_out
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.options import Options
from ddpm_jax.generation.generator import guided, make_generator, sample_key, with_guide
from ddpm_jax.generation.given import Given
from ddpm_jax.generation.image_set import generate_set, tables_of
from ddpm_jax.generation.labels import label_table
from ddpm_jax.generation.options import GivenOptions, SamplerOptions
from ddpm_jax.interop.diffusers import read_model
from ddpm_jax.interop.export import export_run
from ddpm_jax.sampling.guidance import guide
from ddpm_jax.training import step as training
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.start import start_state
from ddpm_jax.training.workdir import load_run, write_run

CLASSES = tiny(
    model={"ch_mult": (1,), "attn_resolutions": (8,), "num_classes": 10},
    train={"label_dropout": 0.2},
    data={"cache": "device"},
)
FEW = SamplerOptions(sampler="ddim", steps=(3,))
ONE = jax.devices()[:1]


@pytest.mark.parametrize(
    ("num_classes", "labels", "absent"), [(3, [0, 2, 2, 1], ""), (4, [0, 2], "2 of these have no images (1, 3)")]
)
def test_classes_without_images_are_told(num_classes, labels, absent):
    source = Source(np.zeros((len(labels), 8, 8, 1), np.uint8), lambda: np.array(labels), {})
    notes = data_notes(tiny(model={"num_classes": num_classes}), source, None)
    assert len(notes) == bool(absent)
    assert all(f"model.num_classes=4, but {absent} and are never trained" in note for note in notes)


def drawn(config, seed=5):
    """Parameters whose zero layers are drawn large enough to matter."""
    params = jax.jit(lambda: training.init_state(experiment(config), jax.random.key(0)).params)()
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    )


def written(workdir, config, params):
    state = training.state_from_params(experiment(config), params)
    write_run(workdir, experiment(config), state)
    return load_run(workdir, mesh=sharding.make_mesh(devices=ONE))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written(tmp_path_factory.mktemp("classes") / "run", CLASSES, drawn(CLASSES))


# ---- Training


@pytest.fixture(scope="module")
def reference():
    return trained(CLASSES, 6)


@pytest.mark.parametrize("cache", ["device", "host", "none"])
def test_labels_follow_their_images_through_every_cache(cache, tmp_path):
    """Each picture's grey level says its class, and the classes are mixed by the order."""
    for label in range(3):
        (tmp_path / f"class_{label}").mkdir()
        for i in range(5):
            Image.new("L", (8, 8), 100 * label + i).save(tmp_path / f"class_{label}" / f"{i}.png")
    config = tiny(data={"source": str(tmp_path), "cache": cache}, model={"num_classes": 3}, train={"batch_size": 4})
    source = open_source(config.data)
    assert source.read_classes() == ["class_0", "class_1", "class_2"]
    batches, dataset = make_feed(config, source, sharding.make_mesh(devices=jax.devices()[:2]))(6, 2)
    images, labels = batches if dataset is None else (array[batches] for array in dataset)
    assert images.shape == (2, 4, 8, 8, 1)
    np.testing.assert_array_equal(labels, images[..., 0, 0, 0] // 100)
    np.testing.assert_array_equal(labels, source.labels[batch_indices(config.seed, 6, 2, 4, 15)])


@pytest.mark.slow
def test_training_with_classes_resumes_bit_for_bit(reference):
    half, first = trained(CLASSES, 2)
    feed = make_feed(CLASSES, open_source(CLASSES.data), sharding.make_mesh(devices=ONE))
    step = training.make_train_step(experiment(CLASSES), mesh=sharding.make_mesh(devices=ONE))
    state = jax.device_put(half, sharding.replicated(sharding.make_mesh(devices=ONE)))
    for at in (2, 4):
        state, _ = step(state, *feed(at, 2))
    assert equal(state, reference[0])
    np.testing.assert_array_equal(first["loss"], reference[1]["loss"][:2])


@pytest.mark.slow
def test_cache_changes_no_bit_of_training_with_classes(reference):
    assert equal(
        trained(dataclasses.replace(CLASSES, data=dataclasses.replace(CLASSES.data, cache="host")), 6), reference
    )


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_training_with_classes_agrees_on_any_devices(reference, count):
    metrics = trained(CLASSES, 6, mesh=sharding.make_mesh(devices=jax.devices()[:count]))[1]
    assert_metrics_agree(metrics, reference[1])


@pytest.mark.slow
def test_accumulation_changes_nothing_but_rounding_with_classes(reference):
    config = dataclasses.replace(CLASSES, train=dataclasses.replace(CLASSES.train, accumulation=2))
    assert_metrics_agree(trained(config, 6)[1], reference[1])


def test_label_dropout_draws_by_its_own_purpose_and_leaves_other_draws_alone():
    with_dropout, without = CLASSES, tiny(model={"num_classes": 10})
    draws = [training.draw(experiment(c), jnp.int32(7), (4000, 1, 1, 1), None) for c in (with_dropout, without)]
    for name in ("flip", "t", "weights", "eps"):
        np.testing.assert_array_equal(*(getattr(d, name) for d in draws))
    dropped = np.asarray(draws[0].drop_label)
    assert abs(dropped.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 4000)
    key = rng.step_key(rng.root_key(CLASSES.seed), Purpose.LABEL_DROPOUT, 7)
    np.testing.assert_array_equal(dropped, jax.random.bernoulli(key, 0.2, (4000,)))
    assert not draws[1].drop_label.any()


@pytest.mark.slow
def test_dropped_labels_are_trained_as_no_class():
    """The gradients of two steps reach the embeddings of the batches' classes, and that of no class."""
    mesh, labels = sharding.make_mesh(devices=ONE), np.full(1797, 3, np.int32)
    labels[::2] = 6
    places, (images, _) = make_feed(CLASSES, open_source(CLASSES.data), mesh)(0, 2)
    state = training.init_sharded_state(experiment(CLASSES), mesh)
    data = images, jax.device_put(labels, sharding.replicated(mesh))
    after, _ = training.make_train_step(experiment(CLASSES), mesh=mesh)(state, places, data)
    moments = np.asarray(after.opt_state[1].mu["label_embedding"]["embedding"])
    assert np.flatnonzero(moments.any(axis=1)).tolist() == [3, 6, 10]


def test_images_without_labels_are_no_batch_of_a_run_with_classes():
    state = jax.eval_shape(lambda: training.init_state(experiment(CLASSES), jax.random.key(0)))
    with pytest.raises(ValueError, match="images and labels of 10 classes"):
        jax.eval_shape(training.one_step(experiment(CLASSES)), state, jnp.zeros((16, 8, 8, 1), jnp.uint8))


@pytest.mark.slow
def test_class_names_are_kept_in_the_workdir_and_shown_in_grids(tmp_path):
    config = dataclasses.replace(
        CLASSES, train=dataclasses.replace(CLASSES.train, steps=10, sample_every=10, num_samples=16)
    )
    train(experiment(config), tmp_path / "run", mesh=one_device())
    run = load_run(tmp_path / "run")
    assert run.classes == tuple("0123456789")
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["num_classes"] == 10
    [sheet] = (tmp_path / "run/samples").glob("*.png")
    shown = np.asarray(Image.open(sheet))
    assert (shown[:10] == 255).mean() > 0.5
    assert (shown[:14] < 128).any()


def test_class_names_go_with_an_exported_file(run, tmp_path, capsys):
    names = tuple("0123456789")
    export_run(dataclasses.replace(run, classes=names), tmp_path / "named.safetensors")
    export_run(dataclasses.replace(run, classes=()), tmp_path / "plain.safetensors")
    assert load_run(tmp_path / "named.safetensors").classes == names
    convert.from_parameters(str(tmp_path / "named.safetensors"), str(tmp_path / "again"), "ema")
    assert load_run(tmp_path / "again").classes == names
    data = dataclasses.replace(CLASSES.data, source=of_classes(tmp_path / "pets", ["cat", "dog"]))
    config = dataclasses.replace(run.config, data=data)
    with contextlib.closing(Checkpoints(tmp_path / "again/checkpoints", config=config)) as checkpoints:
        _, meta = start_state(run.experiment, open_source(data), one_device(), checkpoints)
    assert "Note: class 0 of the checkpoint, '0', is 'cat' now" in capsys.readouterr().out
    assert meta["classes"] == ["cat", "dog"]
    assert load_run(tmp_path / "plain.safetensors").classes == ()


# ---- Sampling


@pytest.mark.slow
def test_image_i_of_a_class_does_not_depend_on_its_batch_or_the_devices(run):
    def images(devices, indices):
        generate = make_generator(run.experiment, sharding.make_mesh(devices=devices), FEW)
        return np.asarray(generate(run.params, sample_key(3), np.asarray(indices, np.int32)), int)

    run = dataclasses.replace(run, params=jax.device_get(run.params))
    everything = images(ONE, range(16))
    assert np.abs(images(ONE, [11]) - everything[[11]]).max() <= 1
    assert np.abs(images(ONE, [15, 2, 7]) - everything[[15, 2, 7]]).max() <= 1
    assert np.abs(images(jax.devices()[:8], range(16)) - everything).max() <= 1


def test_class_changes_the_image(run):
    generate = make_generator(run.experiment, run.mesh, FEW)
    one, other = (np.asarray(generate(run.params, sample_key(3), np.arange(4), np.full(4, c)), int) for c in (3, 4))
    assert (one != other).mean() > 0.1


def test_doubled_batch_equals_two_calls(run):
    labels = jnp.array([3, 1, 4, 1])
    x_t, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 5, 10, 19])
    doubled = guided(run.experiment, SamplerOptions(guidance=3.0), None)(run.params, labels)
    two = guide(run.experiment.model(run.params, labels=labels), run.experiment.model(run.params, labels=10), 3.0)
    expected = np.asarray(jax.jit(two)(x_t, t))
    np.testing.assert_allclose(jax.jit(doubled)(x_t, t), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_guidance_1_evaluates_the_model_once_and_0_ignores_the_class(run):
    evaluated = []
    network = run.experiment.network

    class Counted(type(network)):
        def apply(self, variables, x_t, *rest, **options):
            evaluated.append(len(x_t))
            return super().apply(variables, x_t, *rest, **options)

    counted = dataclasses.replace(
        run.experiment,
        network=Counted(
            **{
                f.name: getattr(network, f.name)
                for f in dataclasses.fields(network)
                if f.init and f.name not in ("parent", "name")
            }
        ),
    )
    for scale, expected in ((1.0, [4]), (0.0, [4]), (2.0, [8])):
        evaluated.clear()
        model = guided(counted, SamplerOptions(guidance=scale), None)(run.params, jnp.arange(4))
        jax.eval_shape(model, jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, int))
        assert evaluated == expected
    x_t, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 5, 10, 19])
    none = guided(run.experiment, SamplerOptions(guidance=0.0), None)(run.params, jnp.arange(4))
    np.testing.assert_array_equal(none(x_t, t), run.experiment.model(run.params)(x_t, t))


@pytest.mark.slow
def test_autoguidance_leads_away_from_another_run(run, tmp_path):
    plain = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)})  # without classes, and so another network
    other = written(tmp_path / "other", plain, drawn(plain, seed=6))
    options = dataclasses.replace(FEW, guidance=2.0, guide_with=str(tmp_path / "other"))
    both = with_guide(run, options)
    generate_set(both, epath.Path(tmp_path / "out"), range(4), seed=0, options=options, batch_size=4, format="npz")
    labels = jnp.arange(4)
    model = guide(run.experiment.model(run.params, labels=labels), other.experiment.model(other.params), 2.0)
    x_t, t = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 5, 10, 19])
    ours = guided(run.experiment, options, other.experiment)((run.params, other.params), labels)
    np.testing.assert_allclose(ours(x_t, t), model(x_t, t), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out/set.json").read_text())["set"]["guide"] == other.checkpoint
    with pytest.raises(UsageError, match="no effect at --guidance 1"):
        with_guide(run, dataclasses.replace(options, guidance=1.0))
    alien = tiny(diffusion={"T": 30}, model={"ch_mult": (1,), "attn_resolutions": (8,)})
    written(tmp_path / "alien", alien, drawn(alien))
    with pytest.raises(UsageError, match="another schedule"):
        with_guide(run, dataclasses.replace(options, guide_with=str(tmp_path / "alien")))
    floats = tiny(data={"value_range": (0.0, 1.0)}, model={"ch_mult": (1,), "attn_resolutions": (8,)})
    written(tmp_path / "floats", floats, drawn(floats))
    with pytest.raises(UsageError, match="of other images"):
        with_guide(run, dataclasses.replace(options, guide_with=str(tmp_path / "floats")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guidance_interval": (0, 5)}, "--guidance-interval has no effect at --guidance 1; leave it out"),
        ({"guidance_rescale": 0.7}, "--guidance-rescale has no effect at --guidance 1"),
        ({"spacing": "quadratic"}, "--spacing quadratic has no effect without --steps"),
    ],
)
def test_sampler_options_without_effect_are_refused(run, options, said):
    with pytest.raises(UsageError, match=said):
        make_generator(run.experiment, run.mesh, SamplerOptions(**options))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), range(3)),
        (("all",), range(3)),
        (("one-per-row",), [0] * 8 + [1] * 8 + [2] * 8),
        (("2", "0", "0"), [2, 0, 0]),
        (("cat", "2", "ship"), [0, 2, 1]),
        (("cat",), [0]),
        (("FILE",), [1, 1, 2]),
    ],
    ids=str,
)
def test_labels_are_taken_in_turn(words, expected, tmp_path):
    (tmp_path / "file.txt").write_text("ship\n1\n\n2\n")
    words = [str(tmp_path / "file.txt") if word == "FILE" else word for word in words]
    assert label_table(words, 3, ("cat", "ship", "dog")).tolist() == list(expected)


@pytest.mark.parametrize(
    ("words", "said"), [(["3"], "'3'"), (["0", "horse"], "'horse'"), (["nofile"], "nofile is neither"), (["-1"], "-1")]
)
def test_labels_that_are_no_classes_are_refused_with_those_that_are(words, said):
    with pytest.raises(UsageError, match=said) as refusal:
        label_table(words, 3, ("cat", "ship", "dog"))
    assert "numbers from 0 to 2, or names such as cat, ship, dog" in str(refusal.value)


def test_labels_need_classes():
    assert label_table((), 0) is None
    with pytest.raises(UsageError, match="this one has none"):
        label_table(("all",), 0)


def test_set_of_classes_continues_and_holds_its_labels(run, tmp_path):
    options = dataclasses.replace(FEW, labels=("3", "5"), guidance=2.0)

    def generate(folder, indices):
        generate_set(run, epath.Path(tmp_path / folder), indices, seed=3, options=options, batch_size=4, format="both")
        with np.load(tmp_path / folder / "images.npz", allow_pickle=False) as arrays:
            return arrays["images"].astype(int), arrays["labels"]

    (whole, labels), (first, _), (second, of_second) = (
        generate("a", range(10)),
        generate("b", range(5)),
        generate("c", range(5, 10)),
    )
    assert labels.tolist() == [3, 5] * 5
    assert of_second.tolist() == [5, 3, 5, 3, 5]
    assert np.abs(np.concatenate([first, second]) - whole).max() <= 1
    with pytest.raises(UsageError, match="labels"):
        generate_set(
            run,
            epath.Path(tmp_path / "a"),
            range(10),
            seed=3,
            options=dataclasses.replace(options, labels=("4",)),
            batch_size=4,
            format="both",
        )


def test_pictures_given_to_a_run_with_classes_need_theirs(run):
    """Otherwise picture i would be drawn as class i, and the images between two pictures as one class after another."""

    def labels(tables, *words, guidance=1.0):
        given = Given(GivenOptions(), tables, {}, None)
        options = SamplerOptions(labels=words, guidance=guidance)
        return tables_of(dataclasses.replace(run, given=given), options)["labels"].tolist()

    pictures, ends = {"pictures": np.zeros((4, 8, 8, 1))}, {"ends": np.zeros((1, 2, 8, 8, 1))}
    assert labels(pictures, "3", "5") == [3, 5]
    assert labels(ends, "3") == [3]
    assert len(labels(ends, guidance=0)) == 10  # ignored
    with pytest.raises(
        UsageError, match=r"has classes, and pictures are given; say of which class they are by --labels"
    ):
        labels(pictures)
    with pytest.raises(UsageError, match=r"--interpolate draws all its images of one class; give one"):
        labels(ends, "3", "5")


def test_definition_of_a_set_without_classes_is_what_it_was():
    """So that sets of earlier versions are continued."""
    assert SamplerOptions().definition() == {
        "sampler": "ancestral",
        "steps": None,
        "spacing": "linspace",
        "eta": None,
        "clip": "static",
    }


def test_grid_has_a_column_for_each_class_or_names_rows():
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    columns = class_grid(images, np.arange(20) % 10, ())
    np.testing.assert_array_equal(columns[14:], enlarge(grid(images, columns=10), smallest=97))
    assert (columns[:14] == 255).any()
    assert (columns[:14] < 128).any()
    sixteen = images[:16]
    rows = class_grid(sixteen, np.arange(16) // 8 + 20, [f"class {i}" for i in range(22)])
    sheet = enlarge(grid(sixteen, columns=8), smallest=122)
    np.testing.assert_array_equal(rows[:, -sheet.shape[1] :], sheet)
    assert rows.shape[1] > sheet.shape[1]


# ---- Evaluation


@pytest.fixture(scope="module")
def evaluation(run):
    source = open_source(CLASSES.data)
    programs = Programs(run.experiment, run.mesh, FEW)
    options = Options(num_images=100, num_real=8, batch_size=20)
    return Evaluation(programs, run.params, source, PIXELS, options, model={})


@pytest.mark.slow
def test_bound_of_a_run_with_classes_is_that_of_each_image_and_its_class(evaluation, run):
    places = evaluation.places
    labels = jnp.asarray(evaluation.source.labels[places])
    drawn = evaluation.drawn()
    ours = drawn.L_T[:8] + drawn.bits[:8].sum(1)
    x_0 = from_uint8(evaluation.read(range(8)))
    expected = bits_per_dim(
        run.experiment.process, run.experiment.model(run.params, labels=labels), _bound_key(), x_0, jnp.asarray(places)
    )
    np.testing.assert_allclose(ours, expected.total, rtol=1e-4)
    others = run.experiment.model(run.params, labels=(labels + 1) % 10)
    wrong = bits_per_dim(run.experiment.process, others, _bound_key(), x_0, jnp.asarray(places))
    assert np.abs(ours / wrong.total - 1).max() > 1e-3


def _bound_key():
    return rng.stream(rng.root_key(0), Purpose.BOUND)


def test_evaluated_samples_have_the_classes_of_the_real_images(evaluation):
    table = evaluation._tables()["labels"]
    np.testing.assert_array_equal(np.bincount(table), np.bincount(evaluation.source.labels))
    assert len(set(table[:30].tolist())) > 5  # also of the first few, though a folder is sorted by class
    generated = np.asarray(evaluation._samples().get(range(20))["images"], int)
    alone = make_generator(evaluation.experiment, evaluation.mesh, FEW)
    expected = alone(evaluation.params, sample_key(0), np.arange(20), table[:20])
    assert np.abs(generated - np.asarray(expected, int)).max() <= 1


def of_classes(path, classes, *, each=2):
    """A folder of pictures for each class, whose brightness is the class's among all."""
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(each):
            Image.new("L", (8, 8), 25 * ["cat", "cow", "dog", "horse"].index(name)).save(path / name / f"{i}.png")
    return str(path)


def test_classes_of_another_source_are_found_by_name(tmp_path):
    """A test set without cows, whose dogs are class 1 of its own, and class 2 of the run."""
    data = dataclasses.replace(CLASSES.data, source=of_classes(tmp_path / "test", ["cat", "dog"]))
    source = open_source(data)
    assert source.labels.tolist() == [0, 0, 1, 1]
    ours = source.in_classes_of(("cat", "cow", "dog"))
    assert ours.labels_of(3).tolist() == [0, 0, 2, 2]
    assert list(ours.read_classes()) == ["cat", "cow", "dog"]
    assert source.in_classes_of(()).labels.tolist() == [0, 0, 1, 1]
    assert open_source(CLASSES.data).in_classes_of(tuple("0123456789")).labels_of(10).max() == 9
    with pytest.raises(UsageError, match=r"class 'dog', and the run has cat, cow; name the classes alike"):
        source.in_classes_of(("cat", "cow")).labels_of(2)


def test_folders_that_all_classes_lie_in_do_not_name_them(tmp_path):
    """As in zip files of folders, train/ and test/ say."""
    source = open_source(dataclasses.replace(CLASSES.data, source=of_classes(tmp_path / "test", ["cat", "dog"])))

    def labels(own, names):
        named = dataclasses.replace(source, read_classes=lambda: own)
        return named.in_classes_of(names).labels.tolist()

    assert labels(["test/cat", "test/dog"], ("train/cat", "train/cow", "train/dog")) == [0, 0, 2, 2]
    assert labels(["cat", "dog"], ("a/b/cat", "a/b/cow", "a/b/dog")) == [0, 0, 2, 2]
    assert labels(["a/cat", "a/dog"], ("a/cat", "a/dog", "b/cat")) == [0, 0, 1, 1]
    assert labels(["a/cat", "a/dog", "a/zebra"], ("a/cat", "b/cow", "a/dog")) == [0, 0, 2, 2]  # no image is a zebra
    with pytest.raises(UsageError, match="the class 'b/cat', and the run has"):
        labels(["b/cat", "a/dog"], ("cat", "dog"))
    with pytest.raises(UsageError, match="the class 'a/dog', and the run has a/cat, b/cow"):
        labels(["a/cat", "a/dog"], ("a/cat", "b/cow"))
    assert without_shared_folders(["only/one"]) == ["one"]
    assert without_shared_folders([]) == []


@pytest.mark.parametrize("bad", [-1, 2])
def test_labels_without_a_class_are_refused_where_classes_are_found_by_name(tmp_path, bad):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8, 1), np.uint8), labels=[0, 1, bad], classes=["dog", "cat"])
    source = open_source(dataclasses.replace(CLASSES.data, source=str(tmp_path / "x.npz")))
    with pytest.raises(UsageError, match=f"name 2 classes, but their labels are {min(bad, 0)} to {max(bad, 1)}"):
        source.in_classes_of(("cat", "dog")).labels_of(2)


def test_held_out_images_and_evaluations_have_the_classes_of_the_run(tmp_path, run):
    source = of_classes(tmp_path / "test", ["cat", "dog"])
    config = dataclasses.replace(CLASSES, train=dataclasses.replace(CLASSES.train, eval_source=source))
    assert open_held_out(experiment(config), (*"abc", "cat", "dog")).labels.tolist() == [3, 3, 4, 4]
    named = dataclasses.replace(run, classes=("cat", "cow", "dog", *"3456789"))

    def labels(*words):
        evaluation = Evaluation.of_run(
            named, tmp_path, PIXELS, Options(source=source), dataclasses.replace(FEW, labels=words)
        )
        return (
            evaluation.labels.tolist(),
            evaluation.sampling()["labels_sha256"],
            evaluation._tables()["labels"].tolist(),
        )

    assert labels("dog")[::2] == ([0, 0, 2, 2], [2])
    (tmp_path / "labels.txt").write_text("cat")
    before = labels(str(tmp_path / "labels.txt"))
    (tmp_path / "labels.txt").write_text("cow")
    assert labels(str(tmp_path / "labels.txt"))[1] != before[1]  # samples of other classes are not taken for these


def test_a_resume_with_data_that_renumber_the_classes_is_refused(tmp_path):
    config = tiny(
        model={"ch_mult": (1,), "attn_resolutions": (8,), "num_classes": 4},
        data={"source": of_classes(tmp_path / "old", ["cat", "cow", "dog"])},
        train={
            "steps": 2,
            "batch_size": 8,
            "sample_every": 0,
            "save_every": 2,
            "log_every": 2,
            "steps_per_dispatch": 2,
        },
    )
    train(experiment(config), tmp_path / "run", mesh=one_device())
    more = of_classes(tmp_path / "more", ["cat", "cow", "dog", "horse"])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", config=config)
    with contextlib.closing(checkpoints):

        def start(source):
            data = dataclasses.replace(config.data, source=source)
            return start_state(experiment(config), open_source(data), one_device(), checkpoints, changed_data=True)

        _, meta = start(more)  # a class after the others leaves them their numbers
        assert meta["classes"] == ["cat", "cow", "dog", "horse"]
        fewer = of_classes(tmp_path / "fewer", ["cat", "cow"])
        _, meta = start(fewer)  # so does one that has no images any more
        assert meta["classes"] == ["cat", "cow", "dog"]
        longer = dataclasses.replace(config.train, eval_every=2, eval_source=config.data.source)
        again = dataclasses.replace(config, data=dataclasses.replace(config.data, source=fewer), train=longer)
        source, held_out = _open_data(experiment(again), epath.Path(tmp_path / "run"))
        assert source.read_classes() == ["cat", "cow", "dog"]  # and it has its name in grids
        assert sorted(set(held_out.labels.tolist())) == [0, 1, 2]
        of_paths = np.zeros((4, 8, 8, 1), np.uint8)
        np.savez(tmp_path / "in.npz", images=of_paths, labels=[0, 1, 2, 2], classes=["in/cat", "in/cow", "in/dog"])
        start(str(tmp_path / "in.npz"))
        with pytest.raises(UsageError, match="class 1 of the checkpoint, 'cow', is 'dog' now"):
            start(of_classes(tmp_path / "without", ["cat", "dog", "horse"]))


def test_agreement_of_real_digits_with_their_labels_is_high_and_with_others_low():
    source = open_source(CLASSES.data)
    images, labels = source.read(np.arange(500)), source.labels[:500]
    assert agreement(images, labels) > 0.95
    assert agreement(images, (labels + 1) % 10) < 0.05


# ---- Weights in and out


def test_class_conditional_model_of_diffusers_computes_the_same_and_comes_back(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = tiny(model={"dropout": 0.0, "num_classes": 7})
    peer = drawn_peer(config, torch, diffusers)
    assert peer.config.num_class_embeds == 7
    peer.save_pretrained(tmp_path / "model")
    read, params = read_model(str(tmp_path / "model"))
    assert (read.model.num_classes, read.train.label_dropout) == (7, 0.0)
    draws = np.random.default_rng(0)
    x, t, labels = (
        draws.normal(size=(5, 8, 8, 1)).astype(np.float32),
        draws.integers(0, 1000, 5),
        draws.integers(0, 7, 5),
    )
    with torch.no_grad():
        theirs = peer.double()(
            torch.tensor(x.transpose(0, 3, 1, 2)).double(), torch.tensor(t), class_labels=torch.tensor(labels)
        )
    ours = jax.jit(experiment(read).model(params, labels=labels))(x, t)
    np.testing.assert_allclose(ours, theirs.sample.permute(0, 2, 3, 1).numpy(), rtol=0, atol=2e-5)
    run = written(tmp_path / "run", read, params)
    command_line = ["to-diffusers", tmp_path / "run", tmp_path / "back"]
    _convert(*command_line)
    again, back = read_model(str(tmp_path / "back"))
    assert again.model == read.model
    assert equal(back, jax.device_get(run.params))


def _convert(*words):
    from interop import convert

    convert(*words)


@pytest.mark.slow
def test_exported_sampler_takes_labels(run, tmp_path):
    from ddpm_jax.interop.export import sampler_file

    short = dataclasses.replace(
        run, experiment=experiment(dataclasses.replace(CLASSES, diffusion=dataclasses.replace(CLASSES.diffusion, T=4)))
    )
    program = jax.export.deserialize(bytearray(sampler_file(short)))
    labels = np.array([7, 7, 2], np.int32)
    images = program.call(jnp.uint32(3), np.arange(3, dtype=np.int32), labels)
    expected = make_generator(short.experiment, run.mesh)(run.params, sample_key(3), np.arange(3), labels)
    assert np.abs(np.asarray(images, int) - np.asarray(expected, int)).max() <= 1


# ---- What is refused


def test_label_dropout_needs_classes():
    with pytest.raises(ConfigError, match=r"label_dropout=0\.1 needs classes"):
        experiment(tiny(train={"label_dropout": 0.1}))


@pytest.mark.parametrize(("classes", "said"), [(9, "labels are 0 to 9; set it to 10"), (10, "")])
def test_labels_beyond_the_classes_are_refused(classes, said):
    source = open_source(CLASSES.data)
    if said:
        with pytest.raises(UsageError, match=said):
            source.labels_of(classes)
    else:
        assert source.labels_of(classes).dtype == np.int32


def test_images_without_labels_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 8, 8, 1), np.uint8))
    config = dataclasses.replace(CLASSES, data=dataclasses.replace(CLASSES.data, source=str(tmp_path / "x.npy")))
    with pytest.raises(UsageError, match="the images have no labels"):
        train(experiment(config), tmp_path / "run", mesh=one_device())
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "checkpoints").exists()


def test_guidance_needs_classes_and_label_dropout():
    plain = experiment(tiny())
    with pytest.raises(UsageError, match="--guidance 2 needs a run with classes"):
        guided(plain, SamplerOptions(guidance=2.0), None)
    always = experiment(tiny(model={"num_classes": 10}))
    with pytest.raises(UsageError, match="label_dropout=0"):
        guided(always, SamplerOptions(guidance=2.0), None)
    with pytest.raises(UsageError, match="label_dropout=0"):
        always.model(None)
    with pytest.raises(UsageError, match="without classes"):
        plain.model(None, labels=3)


@pytest.mark.parametrize(
    "wrong", [{"guidance": float("nan")}, {"guidance_rescale": 2.0}, {"guidance_interval": (9, 3)}], ids=str
)
def test_wrong_guidance_is_refused(wrong):
    with pytest.raises(UsageError, match="--guidance"):
        guided(experiment(CLASSES), SamplerOptions(**({"guidance": 2.0} | wrong)), None)


def test_network_of_ones_own_takes_labels_or_is_refused():
    from flax import linen as nn

    class Labelled(nn.Module):
        @nn.compact
        def __call__(self, x_t, t, labels):
            return nn.Conv(x_t.shape[-1], (3, 3))(x_t) + nn.Embed(11, x_t.shape[-1])(labels)[:, None, None]

    class Deaf(nn.Module):
        @nn.compact
        def __call__(self, x_t, t):
            return nn.Conv(x_t.shape[-1], (3, 3))(x_t)

    own = experiment(CLASSES, network=Labelled())
    params = own.init(jax.random.key(0))
    x_t, t = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2, int)
    one, other = (own.model(params, labels=label)(x_t, t) for label in (0, 1))
    assert (one != other).all()
    with pytest.raises(ConfigError, match="Deaf takes no labels"):
        experiment(CLASSES, network=Deaf())
