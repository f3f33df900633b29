"""Features by exported programs: any function, and a small classifier that is trained here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import CONFIG, make_workdir
from interop import convert, run_script
from jax import export

from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.sharding import make_mesh
from ddpm_jax.data import Source, open_source
from ddpm_jax.evaluation.classifier import Classifier, accuracy, labels_of, outputs, train_classifier
from ddpm_jax.evaluation.program import program_features

SHAPE = (8, 8, 1)


def write_program(path, function, shape=SHAPE, dtype=jnp.uint8, *, size="B"):
    """Exports a function of a batch of images."""
    (B,) = export.symbolic_shape(size)
    like = jax.ShapeDtypeStruct((B, *shape), dtype)
    path.write_bytes(bytes(export.export(jax.jit(function), platforms=("cpu", "cuda"))(like).serialize()))
    return path


def sums(images):
    """The sums of an image's rows."""
    return {"features": images.astype(jnp.float32).sum(axis=(2, 3))}


def load(path, *, devices=8, batch_size=16):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return program_features(path, mesh, image_shape=SHAPE, batch_size=batch_size)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_program_gives_the_features_of_any_number_of_images(devices, tmp_path):
    features = load(write_program(tmp_path / "sums.jax_export", sums), devices=devices)
    images = np.random.default_rng(0).integers(0, 256, (37, *SHAPE), np.uint8)
    found = features.compute(images)
    assert set(found) == {"features"}
    np.testing.assert_array_equal(found["features"], images.astype(np.float32).sum(axis=(2, 3)))


def test_its_name_tells_programs_apart(tmp_path):
    one = load(write_program(tmp_path / "a.jax_export", sums))
    other = load(write_program(tmp_path / "b.jax_export", lambda images: {"features": sums(images)["features"] * 2}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jax_export").write_bytes((tmp_path / "a.jax_export").read_bytes())
    assert re.fullmatch(r"a\.jax_export, sha256 [0-9a-f]{16}", one.name)
    assert one.name.split()[-1] != other.name.split()[-1]
    assert load(tmp_path / "folder" / "a.jax_export").name == one.name


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        (sums, {"shape": (4, 4, 1)}, "does not take uint8 images (8, 8, 1)"),
        (sums, {"dtype": jnp.float32}, "does not take uint8 images (8, 8, 1)"),
        (lambda images: sums(images)["features"], {}, "does not give features"),
        (lambda images: {"logits": sums(images)["features"]}, {}, "does not give features"),
        (lambda images: {**sums(images), "more": images}, {}, "does not give features"),
        (lambda images: {"features": images}, {}, "gives (8, 8, 1) for an image"),
        (lambda images: {"features": sums(images)["features"].sum(axis=0)[None]}, {}, "does not give features"),
    ],
)
def test_a_program_that_gives_no_features_is_refused(function, options, reason, tmp_path):
    path = write_program(tmp_path / "x.jax_export", function, **options)
    with pytest.raises(UsageError, match=re.escape(reason)) as caught:
        load(path)
    assert "give a program of jax.export: uint8 images" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_program_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist; give inception, pixels or a program"):
        load(tmp_path / "x.jax_export")
    (tmp_path / "x.jax_export").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "x.jax_export")


# ---- The classifier


@pytest.fixture(scope="module")
def halves():
    """Two halves of the digits with their labels."""
    digits = open_source(CONFIG.data)
    order = np.random.default_rng(0).permutation(len(digits))

    def part(places):
        return Source(digits.read(places), lambda: digits.labels[places] * 3, digits.identity)

    return part(order[:900]), part(order[900:])


@pytest.mark.slow
def test_a_classifier_learns_to_tell_digits_it_has_not_seen(halves):
    train, test = halves
    model, params = train_classifier(train, epochs=5)
    compute = jax.jit(lambda images: outputs(model, params, images))

    def host(images):
        return jax.device_get(compute(images))

    classes = np.unique(labels_of(train))
    assert classes.tolist() == list(range(0, 30, 3))
    assert accuracy(host, test, classes) > 0.8
    # By its own definition, image by image.
    right = [classes[host(test.read(np.array([i])))["logits"][0].argmax()] == test.labels[i] for i in range(40)]
    some = Source(test.images[:40], lambda: test.labels[:40], {})
    assert accuracy(host, some, classes) == np.mean(right)


def test_images_without_labels_are_refused(halves):
    images = halves[0].images
    with pytest.raises(UsageError, match="have no labels"):
        train_classifier(Source(images, lambda: None, {}), epochs=1)


@pytest.mark.slow
def test_its_file_gives_evaluate_its_features(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    workdir, file = make_workdir(tmp_path / "run"), tmp_path / "digits.jax_export"
    convert("classifier", workdir, file, "--test", "digits", "--epochs", "1")
    share = re.search(r"It is right about ([\d.]+)% of the images of digits", capsys.readouterr().out)
    assert float(share[1]) > 30  # of the ten classes, after one pass
    found = load(file).compute(open_source(CONFIG.data).images[:20])
    assert found["features"].shape == (20, Classifier(10).features)
    assert found["logits"].shape == (20, 10)
    few = ("--num-images", 16, "--num-real", 100, "--batch-size", 16, "--bootstrap", 0, "--no-figures")
    run_script("evaluate", workdir, "--features", file, "--metrics", "fid", "is", *few)
    said = capsys.readouterr().out
    assert "not comparable with published FIDs" in said
    assert "its features are digits.jax_export, sha256 " in said
    assert "is: " in said
    with pytest.raises(UsageError, match="exists; choose another name"):
        convert("classifier", workdir, file)
