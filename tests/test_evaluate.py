"""evaluate.py: numbers from a workdir, with all that defines them, that survive any kill."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from evaluated import CONFIG, make_workdir
from PIL import Image
from scipy.spatial.distance import cdist
from tiny import experiment, tiny

from ddpm_jax.commands import cli
from ddpm_jax.config import to_json
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import batch_indices, epoch_order, open_source
from ddpm_jax.evaluation import evaluation as evaluation_module
from ddpm_jax.evaluation import metrics, scores
from ddpm_jax.evaluation.evaluation import Evaluation, Options, Programs, feature_statistics, read_statistics
from ddpm_jax.evaluation.features import PIXELS, Features, flat_pixels
from ddpm_jax.evaluation.metrics import METRICS, ON_REQUEST, evaluate
from ddpm_jax.evaluation.parts import Parts, load_arrays, save_arrays
from ddpm_jax.evaluation.results import describe
from ddpm_jax.generation.generator import SamplerOptions, draw, generate_batches, make_generator, sample_key
from ddpm_jax.training.workdir import load_run

ROOT = Path(__file__).parent.parent
OPTIONS = Options(num_images=20, num_real=30, batch_size=8, bootstrap=4)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The machine's cache, in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run)


def projection(images):
    """Features of a user's own: five sums of pixels; and logits, so that all metrics can be had."""
    x = flat_pixels(images)["features"] @ np.random.default_rng(0).normal(size=(64, 5))
    return {"features": x, "logits": x}


FEATURES = Features("five sums", projection)


@pytest.fixture(scope="module")
def evaluated(run, loaded):
    """All metrics, on features of a user's own; (evaluation, results, what was in each file)."""
    evaluation = Evaluation.of_run(loaded, run, FEATURES, OPTIONS)
    results = evaluate(evaluation, tuple(name for name in METRICS if name not in ON_REQUEST))
    files = {json.loads(path.read_text())["metric"]: path for path in (run / "evaluation").glob("*.json")}
    return evaluation, results, files


@pytest.fixture(scope="module")
def samples(loaded):
    """The 20 samples, by the functions that sample.py calls."""
    generator, ranges = make_generator(experiment(CONFIG), loaded.mesh), [range(8), range(8, 16), range(16, 24)]
    batches = generate_batches(generator, loaded.params, sample_key(0), ranges, size=8)
    return np.concatenate([images for _, images in batches])[:20]


REAL = epoch_order(0, 2**63, 1797)[:30]  # the places of the 30 real images


def features_of(source, loaded, features=PIXELS):
    """The features of all images of a source."""
    programs, options = Programs(loaded.experiment, loaded.mesh), Options(batch_size=8)
    return Evaluation(programs, loaded.params, source, features, options, model={}).real_features()


def digits():
    return open_source(CONFIG.data).read(REAL)


# ---- The numbers


def test_every_metric_is_that_of_the_samples_and_the_real_images(evaluated, samples):
    _, results, _ = evaluated
    generated, real = projection(samples)["features"], projection(digits())["features"]
    fid = scores.frechet_distance(scores.statistics(generated), scores.statistics(real))
    assert results["fid"]["value"] == pytest.approx(fid, rel=1e-9)
    assert results["is"]["value"] == pytest.approx(scores.inception_score(generated).value, rel=1e-9)
    assert results["kid"]["value"] == pytest.approx(scores.kernel_distance(generated, real).value, rel=1e-9)
    assert results["prdc"]["recall"]["value"] == scores.neighbourhoods(generated, real).recall.value
    assert results["nll"]["value"] == pytest.approx(sum(p["value"] for p in results["nll"]["parts"].values()))
    assert results["rate-distortion"]["distortion_bits"] == pytest.approx(results["nll"]["parts"]["L_0"]["value"])
    rate = results["nll"]["parts"]["L_T"]["value"] + results["nll"]["parts"]["rate"]["value"]
    assert results["rate-distortion"]["rate"] == pytest.approx(rate, rel=1e-9)
    pixels = (flat_pixels(images)["features"] for images in (samples[:8], digits()))
    expected = REAL[np.argsort(cdist(*pixels), axis=1)[:, :8]]
    np.testing.assert_array_equal(results["nearest"]["nearest"]["pixels"]["places"], expected)
    assert set(results["nearest"]["nearest"]) == {"pixels", "five sums"}


def test_some_real_images_are_chosen_at_random_since_a_source_may_be_sorted_by_class(run, loaded, tmp_path):
    """One class lies before the other, as in folders; the bound and the losses of an image are those it has among all."""
    images = np.repeat(np.uint8([40, 200]), 30).reshape(-1, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8)
    np.save(tmp_path / "sorted.npy", images)

    def evaluation(num_real):
        options = Options(num_images=8, num_real=num_real, batch_size=8, source=str(tmp_path / "sorted.npy"))
        return Evaluation.of_run(loaded, run, FEATURES, options)

    some, more, everything = evaluation(12), evaluation(20), evaluation(0)
    np.testing.assert_array_equal(more.places[:12], some.places)
    np.testing.assert_array_equal(everything.places, np.arange(60))
    np.testing.assert_array_equal(evaluation(61).places, np.arange(60))
    assert 3 <= (some.read(range(12)) == 40).all(axis=(1, 2, 3)).sum() <= 9
    np.testing.assert_allclose(some.losses(), everything.losses()[some.places], rtol=1e-5)
    np.testing.assert_allclose(some.drawn().bits, everything.drawn().bits[some.places], rtol=1e-5)
    assert "chosen" not in everything.definition("reference")["reference"]
    order = np.ravel(batch_indices(0, 0, 6, 10, 60))  # what a run of seed 0 is trained on first
    assert set(some.places) != set(order[:12])


def test_every_number_of_a_metric_has_a_name_and_a_direction():
    assert set(metrics.DESCRIPTIONS) == {*METRICS, *scores.Neighbourhoods._fields}
    assert {better for _, better in metrics.DESCRIPTIONS.values()} == {"lower", "higher", ""}


def test_results_hold_everything_that_defines_them(evaluated, run):
    evaluation, results, files = evaluated
    assert set(files) == set(METRICS) - set(ON_REQUEST)
    for name, path in files.items():
        assert json.loads(path.read_text()) == json.loads(json.dumps(results[name]))
        assert path.name.startswith(f"{name}-00000040-")
    made_of = results["fid"]["definition"]
    assert made_of["sampling"] == {
        "step": 40,
        "weights": "ema",
        "weights_sha256": evaluation.model["weights_sha256"],
        "sampler": "ancestral",
        "steps": 10,
        "spacing": "linspace",
        "eta": None,
        "clip": "static",
        "variance": "fixed_small",
        "seed": 0,
        "images": 20,
    }
    assert made_of["features"] == "five sums"
    assert made_of["statistics"] == {
        "source": "digits",
        "identity": evaluation.source.identity,
        "images": 30,
        "chosen": "in random order",
    }
    assert {"python", "ddpm-jax", "jax", "jaxlib", "flax", "numpy", "scipy", "device"} == set(made_of["software"])
    assert results["nll"]["definition"]["bound"]["terms"] == 9


def test_the_weights_checksum_is_that_of_the_ema_parameters(evaluated, run):
    from ddpm_jax.evaluation.evaluation import weights_checksum

    recorded = evaluated[1]["fid"]["definition"]["sampling"]["weights_sha256"]
    assert recorded == weights_checksum(load_run(run).params)
    assert recorded != weights_checksum(load_run(run, weights="raw").params)


def test_fid_on_fewer_than_10000_images_is_labelled_as_not_comparable(evaluated):
    assert "it is of 20 images" in evaluated[1]["is"]["not_comparable"]
    said = evaluated[1]["fid"]["not_comparable"]
    assert said.startswith("not comparable with published FIDs: it is of 20 images, and below 10,000 its bias is large")
    assert evaluated[1]["fid"]["standard_error"] > 0


def test_fid_of_enough_images_by_inception_is_not_labelled(evaluated, monkeypatch):
    monkeypatch.setattr(scores, "MIN_COMPARABLE", 20)
    monkeypatch.setattr(evaluated[0], "features", FEATURES._replace(name="inception-2015-12-05, drawn for this test"))
    assert "not_comparable" not in metrics.fid(evaluated[0])


def test_fid_of_features_that_are_not_inceptions_is_labelled(run, loaded, monkeypatch):
    monkeypatch.setattr(scores, "MIN_COMPARABLE", 20)
    result = metrics.fid(Evaluation.of_run(loaded, run, PIXELS, OPTIONS))
    assert "its features are pixels, not Inception's" in result["not_comparable"]
    assert "20 images leave the covariance of 64 features singular" in result["not_comparable"]


def test_the_real_images_covariance_is_factored_once(evaluated, run, loaded, monkeypatch):
    """And kept: after the evaluation before, only the samples' is left, and that of each resampled set."""
    factored = []
    monkeypatch.setattr(scores, "from_covariance", lambda *of, f=scores.from_covariance: factored.append(1) or f(*of))
    result = metrics.fid(Evaluation.of_run(loaded, run, FEATURES, OPTIONS))
    assert result["standard_error"] == evaluated[1]["fid"]["standard_error"]
    assert len(factored) == 1 + OPTIONS.bootstrap


def test_the_distance_of_few_images_is_that_of_their_covariances(run, loaded, samples):
    """64 pixels of 20 samples and 30 real images, whose covariances are not formed."""
    result = metrics.fid(Evaluation.of_run(loaded, run, PIXELS, OPTIONS))
    given = (flat_pixels(images)["features"].astype(np.float64) for images in (samples, digits()))
    expected = scores.frechet_distance(
        *(scores.from_covariance(x.mean(axis=0), np.cov(x, rowvar=False)) for x in given)
    )
    assert result["value"] == pytest.approx(expected, rel=1e-6)


def test_each_result_is_written_and_told_before_the_next_is_computed(run, loaded, monkeypatch):
    evaluation, told = Evaluation.of_run(loaded, run, FEATURES, dataclasses.replace(OPTIONS, num_real=29)), []

    def tell(result):
        assert json.loads((evaluation.folder / metrics.file_name(result)).read_text()) == json.loads(json.dumps(result))
        told.append(result["metric"])

    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(METRICS, "fid", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation, ("kid", "fid", "nll"), tell=tell)
    assert told == ["kid"]


def test_published_statistics_can_be_given_instead_of_images(evaluated, run, loaded, tmp_path):
    real = scores.statistics(projection(digits())["features"])
    np.savez(tmp_path / "statistics.npz", mu=real.mu, sigma=real.root @ real.root.T)
    options = dataclasses.replace(OPTIONS, statistics=str(tmp_path / "statistics.npz"))
    result = evaluate(Evaluation.of_run(loaded, run, FEATURES, options), ("fid",))["fid"]
    assert result["value"] == pytest.approx(evaluated[1]["fid"]["value"], rel=1e-9)
    assert set(result["definition"]["statistics"]) == {"statistics", "sha256"}


def test_results_of_another_definition_are_other_files(evaluated, run, loaded):
    before = evaluated[2]["prdc"].read_bytes()
    evaluate(Evaluation.of_run(loaded, run, Features("other", projection), OPTIONS), ("prdc",))
    assert len(list((run / "evaluation").glob("prdc-*.json"))) == 2
    assert evaluated[2]["prdc"].read_bytes() == before


def test_the_documents_feature_function_runs(evaluated, run, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)[1]
    code = code.replace("runs/digits", str(run)).replace("num_images=512", "num_images=20, batch_size=8")
    exec(compile(code, "evaluation.md", "exec"), {})
    assert "'brightness'" in capsys.readouterr().out


# ---- Continuing


def test_what_was_computed_is_read_back_and_the_numbers_are_the_same(evaluated, run, loaded, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(evaluation_module, "draw", never)
    monkeypatch.setattr(evaluation_module.bits, "make_bound", lambda *args: never)
    monkeypatch.setattr(
        evaluation_module.scores,
        "statistics_of_parts",
        lambda parts, f=scores.statistics_of_parts: f(parts) if isinstance(parts, list) else never(),
    )
    again = evaluate(Evaluation.of_run(loaded, run, FEATURES, OPTIONS), ("fid", "kid", "nll"))
    for name, result in again.items():
        assert result == evaluated[1][name]


def test_more_images_continue_from_those_that_are_there(evaluated, run, loaded, monkeypatch):
    asked = []

    def counted(*args, f=draw, **kwargs):
        asked.append(args[3])
        return f(*args, **kwargs)

    monkeypatch.setattr(evaluation_module, "draw", counted)
    options = dataclasses.replace(OPTIONS, num_images=32)
    evaluation = Evaluation.of_run(loaded, run, FEATURES, options)
    assert len(evaluation.generated()["features"]) == 32
    assert asked == [range(16, 24), range(24, 32)]  # 16 .. 19 were a part of their own
    np.testing.assert_array_equal(evaluation.generated()["features"][:16], evaluated[0].generated()["features"][:16])


DAMAGES = {
    "cut short": lambda b: b[:100],
    "zeros at its end": lambda b: b[:-200] + bytes(200),
    "empty": lambda b: b"",
    "a bit of the header": lambda b: b.replace(b"{'descr'", b"{\xa7descr'"),
    "an open bracket": lambda b: b.replace(b"(4,), }", b"(4,(, }"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_part_is_computed_anew_and_named(tmp_path, damage, capsys):
    def compute(part):
        return {"x": np.arange(part.start, part.stop) ** 2}

    parts = Parts(tmp_path, {"a": 1}, compute)
    expected = parts.all(10, 4, title="x")["x"]
    np.testing.assert_array_equal(expected, np.arange(10) ** 2)
    path = sorted(parts.folder.glob("*.npz"))[1]
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    np.testing.assert_array_equal(Parts(tmp_path, {"a": 1}, compute).all(10, 4, title="x")["x"], expected)
    assert load_arrays(path)["x"].tolist() == [16, 25, 36, 49]
    assert f"{path} is damaged (" in capsys.readouterr().out


def test_a_part_in_anothers_place_is_computed_anew(tmp_path, capsys):
    """Of another range, of another definition, or of something else."""

    def compute(part):
        return {"x": np.arange(part.start, part.stop) ** 2}

    parts, other = (Parts(tmp_path, {"a": a}, lambda part, a=a: {"x": np.full(len(part), a)}) for a in (1, 2))
    parts.compute = compute
    expected = parts.all(12, 4, title="x")["x"]
    other.all(12, 4, title="x")
    first, second, third = sorted(parts.folder.glob("*.npz"))
    for there in (first, other.folder / second.name, tmp_path / "mine.npz"):
        np.savez(tmp_path / "mine.npz", x=np.arange(4))
        shutil.copy(there, second)
        np.testing.assert_array_equal(Parts(tmp_path, {"a": 1}, compute).all(12, 4, title="x")["x"], expected)
    assert capsys.readouterr().out.count(f"{second} is damaged") == 3


@pytest.mark.parametrize("there", [b"", b"[]", b"[" * 100_000, b"\xff", b"{}"], ids=lambda b: repr(b[:9]))
def test_a_damaged_definition_of_parts_is_written_anew(there, tmp_path):
    parts = Parts(tmp_path, {"a": 1}, lambda part: {"x": np.arange(len(part))})
    parts.get(range(3))
    (parts.folder / "definition.json").write_bytes(there)
    Parts(tmp_path, {"a": 1}, parts.compute).get(range(3))
    assert json.loads((parts.folder / "definition.json").read_text()) == {"a": 1}


def test_features_of_pictures_that_were_edited_in_place_are_computed_anew(loaded, tmp_path):
    """Uncompressed pictures keep their names and sizes, which are a folder's fingerprint."""

    def brightness(value):
        path = tmp_path / "a.bmp"
        Image.new("L", (8, 8), value).save(path)
        os.utime(path, ns=(0, 1_000_000_000 * value))
        source = open_source(dataclasses.replace(CONFIG.data, source=str(tmp_path)))
        features = features_of(source, loaded)
        return source.identity, features.all(1, 8, title="")["features"].mean()

    (before, dark), (after, bright) = brightness(10), brightness(200)
    assert before == after
    assert bright > dark + 1


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_statistics_are_computed_anew(loaded, damage):
    features = features_of(open_source(CONFIG.data), loaded)
    expected = feature_statistics(features, count=80, batch_size=8)
    path = features.folder / "statistics-80.npz"
    path.write_bytes(damage(path.read_bytes()) if b"(4,)" in path.read_bytes() else path.read_bytes()[:100])
    np.testing.assert_array_equal(feature_statistics(features, count=80, batch_size=8).root, expected.root)


# ---- One process, and room


def test_a_workdir_that_another_process_evaluates_is_refused(run, loaded):
    evaluation = Evaluation.of_run(loaded, run, PIXELS, OPTIONS)
    with (
        evaluation.alone(),
        pytest.raises(UsageError, match=rf"evaluation is being written by process {os.getpid()} on "),
    ):
        Evaluation.of_run(loaded, run, PIXELS, OPTIONS).alone().__enter__()
    assert not (run / "evaluation" / "lock").exists()


def test_what_a_killed_evaluation_left_is_swept(run, loaded):
    left = [run / "evaluation" / name for name in ("fid.json.7.tmp", "figures/a.png.7.tmp", "parts/0123/0-7.npz.7.tmp")]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with Evaluation.of_run(loaded, run, PIXELS, OPTIONS).alone():
        assert not any(path.exists() for path in left)
    shutil.rmtree(left[2].parent)


def test_a_workdir_that_cannot_be_written_is_refused_before_anything_is_computed(run, loaded, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    evaluation = Evaluation.of_run(loaded, run, PIXELS, OPTIONS)
    monkeypatch.setattr("ddpm_jax.core.files.tempfile.TemporaryDirectory", refuse)
    with pytest.raises(
        UsageError, match=r"evaluation/.* cannot be written \(Read-only file system\); make the workdir"
    ):
        evaluation.alone().__enter__()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"batch_size": 10**9},
            r"--batch-size 1000000000 needs at least [\d,.]+ GiB of memory, and .*; use a smaller one",
        ),
        (
            {"num_images": 2 * 10**9},
            r"--num-images 2000000000 .* needs at least 476.8 GiB of memory, and 1.0 GiB are free",
        ),
        ({"num_images": 10**10}, r"--num-images 10000000000 is too large; use 2000000000 or less"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_bytes(changed, message, run, loaded, monkeypatch):
    monkeypatch.setattr("ddpm_jax.core.room.free_memory", lambda: 2**30)
    with pytest.raises(UsageError, match=message):
        Evaluation.of_run(loaded, run, PIXELS, dataclasses.replace(OPTIONS, **changed))


def test_a_distance_that_would_not_end_is_refused_before_anything_is_computed(run, loaded, monkeypatch):
    """Of more images than 4,096 with more pixels; 64 pixels are few."""

    def never(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(evaluation_module, "draw", never)
    monkeypatch.setattr(scores, "MOST_RANK", 29)
    with pytest.raises(UsageError, match=r"30 images of 64 features.* --num-real\), or Inception's features"):
        evaluate(Evaluation.of_run(loaded, run, PIXELS, OPTIONS), ("kid", "fid"))
    Evaluation.of_run(loaded, run, PIXELS, dataclasses.replace(OPTIONS, num_real=29)).check_distance()
    Evaluation.of_run(loaded, run, PIXELS, dataclasses.replace(OPTIONS, statistics="of-64.npz")).check_distance()


def test_a_distance_for_which_the_memory_has_no_room_is_refused(run, loaded, monkeypatch):
    evaluation = Evaluation.of_run(loaded, run, PIXELS, OPTIONS)
    monkeypatch.setattr("ddpm_jax.core.room.free_memory", lambda: 8 * 64 * 50 - 1)
    with pytest.raises(UsageError, match=r"Fréchet distance of 30 images needs at least .* of memory.*; use fewer"):
        evaluate(evaluation, ("fid",))


def test_samples_for_which_the_disk_has_no_room_are_refused(run, loaded, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    options = dataclasses.replace(OPTIONS, num_images=10**5)
    with pytest.raises(UsageError, match=r"--num-images 100000 .* needs \d+ MiB on the disk, and 1 MiB are free in "):
        Evaluation.of_run(loaded, run, PIXELS, options)


# ---- Continuing, again


def test_features_of_one_data_set_at_two_sizes_never_mix(loaded):
    """A folder of pictures has one identity, of names and bytes, whatever size they are brought to."""
    whole = open_source(CONFIG.data)
    brightness = Features("brightness", lambda images: {"features": images.mean(axis=(1, 2))})
    for source in (whole, dataclasses.replace(whole, images=whole.images[:, :4])):
        parts = features_of(source, loaded, brightness)
        mu = feature_statistics(parts, count=16, batch_size=8).mu
        np.testing.assert_allclose(mu, source.images[:16].mean(), rtol=1e-12)


def test_results_of_raw_parameters_say_so(run):
    raw = load_run(run, weights="raw")
    assert Evaluation.of_run(raw, run, PIXELS, OPTIONS).model["weights"] == "raw"


def test_parts_of_another_definition_never_mix_in(tmp_path):
    for a in (1, 2):
        parts = Parts(tmp_path, {"a": a}, lambda part, a=a: {"x": np.full(len(part), a)})
        assert set(parts.all(4, 2, title="x")["x"]) == {a}


def test_a_part_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    save_arrays(tmp_path / "part.npz", {"x": np.arange(3)})
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        save_arrays(tmp_path / "part.npz", {"x": np.arange(4)})
    assert load_arrays(tmp_path / "part.npz")["x"].tolist() == [0, 1, 2]


@pytest.mark.slow
def test_an_evaluation_killed_three_times_continues_and_gives_the_same_numbers(run, tmp_path):
    """SIGKILL after ever more parts are there, in the samples and in the bound; then the same command to its end."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    numbers = {}
    for name, kills in (("killed", (2, 9, 23)), ("whole", ())):
        workdir = make_workdir(tmp_path / name)
        command = [sys.executable, "evaluate.py", str(workdir), "--features", "pixels", "--metrics", "fid", "nll"]
        command += ["--num-images", "36", "--num-real", "36", "--batch-size", "3", "--no-figures", "--seed", "5"]
        start = {"cwd": ROOT, "env": environment | {"DDPM_JAX_CACHE": str(tmp_path / f"cache_{name}")}}
        for count in kills:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **start)
            while len(list(workdir.glob("evaluation/parts/*/0*.npz"))) < count:
                assert process.poll() is None, process.communicate()[0].decode()
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
        done = subprocess.run(command, capture_output=True, text=True, check=False, **start)
        assert done.returncode == 0, done.stderr
        assert "not comparable with published FIDs" in done.stdout
        numbers[name] = [json.loads(p.read_text()) for p in sorted(workdir.glob("evaluation/*.json"))]
        assert (workdir / "report.html").exists()
    assert len(numbers["whole"]) == 2
    assert numbers["killed"] == numbers["whole"]


# ---- Refusals: one sentence each


def refused(call):
    with pytest.raises(UsageError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_images": -1}, "--num-images -1 is too small; use 0 or more"),
        ({"batch_size": 0}, "--batch-size 0 is too small; use 1 or more"),
        ({"bootstrap": 1}, "--bootstrap 1 has no spread; use 0 for none, or 2 or more"),
        ({"seed": 2**32}, "--seed 4294967296 is too large; use 4294967295 or less"),
        ({"terms": 10}, "got 10 terms of the bound, expected 1 to 9; 0 stands for all"),
        ({"source": "none.npz"}, "data.source='none.npz' does not exist; use one of "),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(run, loaded, changed, message):
    options = dataclasses.replace(OPTIONS, **changed)
    assert refused(lambda: Evaluation.of_run(loaded, run, PIXELS, options)).startswith(message)


def test_a_reference_with_another_image_size_is_refused(run, loaded, tmp_path):
    np.save(tmp_path / "real.npy", np.zeros((4, 16, 16, 1), np.uint8))
    options = dataclasses.replace(OPTIONS, source=str(tmp_path / "real.npy"))
    assert "has images of shape (16, 16, 1), but data.image_size and data.channels say (8, 8, 1)" in refused(
        lambda: Evaluation.of_run(loaded, run, PIXELS, options)
    )


def test_too_few_images_for_the_covariance_are_refused(run, loaded):
    options = dataclasses.replace(OPTIONS, num_real=1)
    message = refused(lambda: evaluate(Evaluation.of_run(loaded, run, FEATURES, options), ("fid",)))
    assert message == "got 1 image(s), but a covariance needs at least 2; take more images"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"mu": np.zeros(3), "sigma": np.eye(3)},
            "are of 3 features, but five sums has 5; give statistics of the same",
        ),
        (
            {"mu": np.zeros(5), "sigma": np.full((5, 5), np.nan)},
            "has numbers that are not finite; give other statistics",
        ),
        ({"mu": np.zeros(5), "sigma": np.eye(4)}, "has mu (5,) and sigma (4, 4), expected (D,) and (D, D)"),
        ({"mu": np.array(["a"] * 5), "sigma": np.eye(5)}, "is not an .npz file with the arrays mu and sigma"),
        ({"mean": np.zeros(5)}, "is not an .npz file with the arrays mu and sigma; give such a file"),
        ({"mu": np.array([{}] * 5), "sigma": np.eye(5)}, "is not an .npz file with the arrays mu and sigma"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(run, loaded, tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    options = dataclasses.replace(OPTIONS, statistics=str(tmp_path / "s.npz"))
    assert message in refused(lambda: evaluate(Evaluation.of_run(loaded, run, FEATURES, options), ("fid",)))


def test_a_folder_in_the_place_of_statistics_is_refused(run, loaded, tmp_path):
    options = dataclasses.replace(OPTIONS, statistics=str(tmp_path))
    message = refused(lambda: evaluate(Evaluation.of_run(loaded, run, FEATURES, options), ("fid",)))
    assert message.endswith("is not an .npz file with the arrays mu and sigma; give such a file")


@pytest.mark.parametrize(
    "there", [b"", b"\x93NUMPY", b"PK\x03\x04" + bytes(50), b"[" * 100_000, None], ids=lambda b: repr(b)[:20]
)
def test_a_damaged_file_of_statistics_is_refused(there, tmp_path):
    path = epath.Path(tmp_path / "s.npz")
    if there is None:
        os.mkfifo(path)
    else:
        path.write_bytes(there)
    with pytest.raises(UsageError, match="with the arrays mu and sigma; give such a file"):
        read_statistics(path)


def test_the_best_checkpoint_of_a_run_without_evaluations_is_refused(command, run):
    code, _, err = command(str(run), "--step", "best")
    assert code == 2
    assert err.startswith(f"{run} has no eval_loss yet; set train.eval_every, or give a step")


def test_the_inception_score_needs_logits(run, loaded):
    message = refused(lambda: evaluate(Evaluation.of_run(loaded, run, PIXELS, OPTIONS), ("is",)))
    assert message == "the metric is needs logits, which --features pixels does not have; use inception"


def test_a_workdir_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_json(tiny())))
    assert "has no checkpoint yet; train longer, or give another workdir" in refused(lambda: load_run(tmp_path))


def test_an_unknown_metric_is_refused(evaluated):
    message = refused(lambda: evaluate(evaluated[0], ("fdi",)))
    assert f"got the metric 'fdi', expected some of {', '.join(METRICS)}" in message


# ---- The command line


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs evaluate.py as its command line would: (exit code, standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "1000")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            cli.prepare("evaluate")()
            code = 0
        except UsageError as error:
            return 2, "", str(error)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return command


def test_inception_metrics_without_weights_are_told_in_one_sentence(command, run):
    code, out, err = command(run, "--metrics", "fid")
    assert (code, out) == (2, "")
    assert err.startswith("the Inception weights are not there")
    assert "download pt_inception-2015-12-05-6726825d.pth" in err
    assert (
        "without them nll, rate-distortion and nearest work, and fid, kid and prdc of pixels (--features pixels," in err
    )
    assert "\n" not in err


def test_without_weights_the_default_is_what_can_be_computed_without(command, evaluated, run):
    options = ["--num-images", 20, "--num-real", 30, "--batch-size", 8, "--no-figures"]
    code, out, _ = command(run, *options)
    assert code == 0
    assert "Without Inception weights only losses, nearest, nll, rate-distortion are computed; download" in out
    assert f"nll: {describe(evaluated[1]['nll'])}\n" in out
    assert "The report: " in out
    [drawn] = (run / "evaluation" / "figures").iterdir()  # for the report's top; nothing else is drawn
    assert drawn.name == "samples-00000040.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist; give the folder of a run that train.py made"),
        (
            ["nowhere", "--metrics"],
            "--metrics is empty, and WORKDIR is nowhere; give some of losses, nearest, is, kid, fid, prdc, nll, rate-distortion",
        ),
    ],
)
def test_a_wrong_command_line_is_told_in_one_sentence(command, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)


def test_preprocessing_without_inception_is_refused(command, run):
    code, _, err = command(run, "--features", "pixels", "--preprocessing", "pytorch-fid")
    assert (code, err.split(";")[1].strip()) == (2, "leave it out")
    assert err.startswith("--preprocessing pytorch-fid is Inception's, and has no effect on --features pixels")


def test_a_missing_workdir_is_told(command):
    for arguments in ([], ["--features", "pixels"]):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "")
        assert "WORKDIR" in err
        assert "evaluate.py --help" in err
    assert "--metrics is empty, and WORKDIR is fid; give some of" in command("--metrics", "fid")[2]


def test_a_wrong_metric_is_answered_with_the_choices(command):
    code, _, err = command("nowhere", "--metrics", "fdi")
    assert code == 2
    assert "fid" in err
    assert "nearest" in err


def test_help_shows_every_option(command):
    code, out, _ = command("--help")
    assert code == 0
    for option in ("--metrics", "--features", "--num-images", "--terms", "--statistics", "--source", "--no-figures"):
        assert option in out


def test_samples_of_another_sampler_are_a_result_of_their_own(evaluated, run, loaded):
    """--sampler and its options define a result, and are told apart from Algorithm 2's."""
    sampler = SamplerOptions(sampler="ddim", steps=(3,))
    evaluation = Evaluation.of_run(loaded, run, FEATURES, OPTIONS, sampler)
    made_of = evaluation.definition("sampling")["sampling"]
    assert (made_of["sampler"], made_of["steps"]) == ("ddim", 3)
    images = np.asarray(
        make_generator(experiment(CONFIG), loaded.mesh, sampler)(loaded.params, sample_key(0), np.arange(8))
    )
    np.testing.assert_array_equal(evaluation.first_samples(), images)
    assert not np.array_equal(evaluation.first_samples(), evaluated[0].first_samples())
