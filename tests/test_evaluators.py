"""What a run measures of itself while it trains, and the checkpoint that is kept for it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import experiment, tiny

from ddpm_jax.commands import train as command
from ddpm_jax.commands.train import train
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import open_source
from ddpm_jax.diffusion.bound import bits_per_dim
from ddpm_jax.diffusion.losses import min_snr_weights
from ddpm_jax.diffusion.process import Process
from ddpm_jax.evaluation import scores
from ddpm_jax.evaluation.evaluation import Programs
from ddpm_jax.evaluation.evaluators import TERMS, HeldOut, eval_of, open_held_out, spread
from ddpm_jax.evaluation.features import flat_pixels
from ddpm_jax.generation.generator import sample_key
from ddpm_jax.training.loop import Findings
from ddpm_jax.training.metric_writer import best_step, read_metrics
from ddpm_jax.training.step import init_sharded_state
from ddpm_jax.training.workdir import CHECKPOINTS, load_run

# A network without hidden layers to speak of, whose last convolution starts at zero: eps is predicted as 0.
CONFIG = tiny(
    model={"ch_mult": (1,), "attn_resolutions": (8,)},
    diffusion={"loss_weighting": "min_snr", "min_snr_gamma": 0.5},
    train={
        "steps": 10,
        "steps_per_dispatch": 1,
        "save_every": 2,
        "log_every": 2,
        "eval_every": 2,
        "eval_source": "digits",
        "eval_images": 500,
        "eval_samples": 6,
        "eval_features": "pixels",
    },
)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """The digits as negatives, which the training images are not."""
    path = tmp_path_factory.mktemp("held_out") / "negatives.npy"
    np.save(path, 255 - open_source(CONFIG.data).images)
    return open_source(dataclasses.replace(CONFIG.data, source=str(path)))


@pytest.fixture(scope="module")
def at_the_start(tmp_path_factory, held_out):
    """The numbers of the untrained network."""
    mesh = sharding.make_mesh()
    programs, source = Programs(experiment(CONFIG), mesh, terms=TERMS), open_source(CONFIG.data)
    some = dataclasses.replace(held_out, images=held_out.read(spread(held_out, CONFIG.train.eval_images)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        state = init_sharded_state(experiment(CONFIG), mesh)
        return HeldOut(programs, source, some)(state).numbers, state.ema_params, programs.generate


@pytest.mark.slow
def test_the_losses_are_those_of_each_quarter_of_t(at_the_start):
    """Where eps is predicted as 0, the weighted loss at t is the weight times a mean of eps^2."""
    values, _, _ = at_the_start
    schedule = experiment(CONFIG).process.schedule
    weights = min_snr_weights(Process(schedule, prediction="eps"), 0.5).reshape(4, -1)
    assert (np.diff(weights.mean(axis=1)[:3]) > 0.1).all()  # the quarters can be told apart
    N, D = 500, 64
    for i, quarter in enumerate(weights, 1):
        second_moment = (quarter**2).mean() * (1 + 2 / D)
        error = np.sqrt((second_moment - quarter.mean() ** 2) / N)
        assert abs(values[f"eval_loss_quarter_{i}"] - quarter.mean()) < 4 * error
    quarters = [values[f"eval_loss_quarter_{i}"] for i in (1, 2, 3, 4)]
    assert values["eval_loss"] == pytest.approx(np.mean(quarters), rel=1e-12)


@pytest.mark.slow
def test_bits_per_dim_estimate_the_whole_bound_of_the_held_out_images(at_the_start, held_out):
    """16 terms of the 19 between L_T and L_0, of 500 images, against all terms of all images."""
    values, _, _ = at_the_start
    x_0 = held_out.images.astype(np.float32) / 127.5 - 1.0
    bits = jax.jit(
        lambda x_0: (
            bits_per_dim(
                Process(experiment(CONFIG).process.schedule),
                lambda x, t: jnp.zeros_like(x),
                jax.random.key(1),
                x_0,
                jnp.arange(len(x_0)),
            ).total
        )
    )(x_0)
    error = np.hypot(values["eval_bits_per_dim_error"], np.std(bits) / np.sqrt(len(bits)))
    assert abs(values["eval_bits_per_dim"] - np.mean(bits)) < 4 * error


@pytest.mark.slow
def test_the_fid_is_that_of_the_first_samples_and_the_training_images(at_the_start):
    values, params, generator = at_the_start
    images = np.asarray(generator(params, sample_key(CONFIG.seed), np.arange(8, dtype=np.int32)))[:6]
    features = (flat_pixels(a)["features"] for a in (images, open_source(CONFIG.data).images))
    expected = scores.frechet_distance(*map(scores.statistics, features))
    assert values["eval_fid"] == pytest.approx(expected, rel=1e-6)


def test_held_out_images_are_taken_from_the_whole_source():
    source = open_source(CONFIG.data)
    assert spread(source, 10).tolist() == [i * len(source) // 10 for i in range(10)]
    assert spread(source, 10_000).tolist() == list(range(len(source)))


class Told:
    """An evaluator that is told its losses, one after the other."""

    name = "eval_loss"

    def __init__(self, every, losses):
        self.every, self.losses = every, iter(losses)

    def __call__(self, state):
        return Findings({"eval_loss": next(self.losses)}, {})


def measures(*losses):
    """In place of `make_evaluators`: one that gives these losses."""
    return lambda experiment, *_: [Told(experiment.config.train.eval_every, losses)]


def make_idle_step(experiment, *, mesh):
    """In place of `make_train_step`: steps that leave the parameters as they are, with nothing to compile."""

    def idle(state, batches, dataset):
        state = dataclasses.replace(state, step=state.step + len(batches))
        return state, {"loss": jnp.ones(len(batches)), "grad_norm": jnp.ones(len(batches))}

    return idle


@pytest.fixture(scope="module", autouse=True)
def _idle():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "make_train_step", make_idle_step)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 10 steps that is told to be at its best at step 4."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "make_evaluators", measures(6.0, 2.0, 6.0, 18.0, 38.0))
        train(experiment(CONFIG), workdir)
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "w")


def test_the_best_checkpoint_is_kept_and_can_be_loaded(run):
    logged = [(line["step"], line["eval_loss"]) for line in read_metrics(run) if "eval_loss" in line]
    assert logged == [(2, 6.0), (4, 2.0), (6, 6.0), (8, 18.0), (10, 38.0)]
    assert sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir()) == [4, 8, 10]
    assert load_run(run, step="best").step == 4
    assert load_run(run).step == 10


@pytest.mark.slow
def test_the_best_checkpoint_gives_way_to_a_better_one(run, monkeypatch):
    monkeypatch.setattr(command, "make_evaluators", measures(1.0, 1.0, 1.0))
    train(experiment(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=16))), run)
    # 12, 14 and 16 are equally good: the first of them stays the best.
    assert sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir()) == [12, 14, 16]
    assert load_run(run, step="best").step == 12


def test_an_evaluation_that_was_lost_between_the_save_and_the_stop_is_made_up_for(run, monkeypatch):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    monkeypatch.setattr(command, "make_evaluators", measures(38.0))
    train(experiment(CONFIG), run)
    assert path.read_text().splitlines(keepends=True) == lines
    train(experiment(CONFIG), run)  # and not once more
    assert path.read_text().splitlines(keepends=True) == lines


def test_the_best_of_a_run_without_evaluations_is_refused(run):
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match=r"has no eval_loss yet; set train\.eval_every, or give a step"):
        load_run(run, step="best")


def test_the_best_that_is_not_saved_any_more_is_told(run, capsys):
    load_run(run, step="best")
    assert capsys.readouterr().out == ""
    shutil.rmtree(run / CHECKPOINTS / "4")
    load_run(run, step="best")
    assert "Note: eval_loss was least at step 4, which is not saved any more; step" in capsys.readouterr().out


@pytest.mark.slow
def test_the_best_checkpoint_stays_when_the_run_goes_on_without_evaluations(run):
    train(experiment(dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=16, eval_every=0))), run)
    assert sorted(int(path.name) for path in (run / CHECKPOINTS).iterdir()) == [4, 14, 16]
    assert load_run(run, step="best").step == 4


def test_what_is_not_a_number_is_never_the_best(tmp_path):
    lines = ['{"step": 2, "eval_loss": NaN}', '{"step": 4, "eval_loss": 3.0}', '{"step": 6, "l']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert best_step(tmp_path, "eval_loss", [2, 4, 6]) == 4
    assert best_step(tmp_path, "eval_loss", [2, 6]) is None
    assert best_step(tmp_path, "eval_fid", [2, 4, 6]) is None


def test_only_evaluations_of_the_same_are_compared(tmp_path):
    """An FID of pixels, then two of Inception's features: the first is less, and says nothing."""
    lines = [
        {"step": 2, "eval_fid": 0.4, "eval_of": "a"},
        {"step": 4, "eval_fid": 25.0, "eval_of": "b"},
        {"step": 6, "eval_fid": 30.0, "eval_of": "b"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert best_step(tmp_path, "eval_fid", [2, 4, 6]) == 4


def test_what_can_be_compared_is_of_the_same_images_samples_and_features(held_out):
    source = open_source(CONFIG.data)

    def with_options(**options):
        return eval_of(
            dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **options)), source, held_out
        )

    others = [with_options(eval_images=2), with_options(eval_samples=8), with_options(eval_features="inception")]
    assert len({with_options(), eval_of(CONFIG, source, source), *others}) == 5
    assert with_options(eval_every=4) == with_options(keep_best="eval_fid") == with_options()


def test_held_out_images_that_are_the_training_images_are_told(held_out):
    source = open_source(CONFIG.data)
    (note,) = command.data_notes(CONFIG, source, open_held_out(experiment(CONFIG)))
    assert note.startswith(
        "train.eval_source=digits holds the training images, so its numbers tell nothing of new ones"
    )
    assert command.data_notes(CONFIG, source, held_out) == command.data_notes(CONFIG, source, None) == []


def test_one_held_out_image_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8, 1), np.uint8))
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, eval_source=str(tmp_path / "one.npy")))
    with pytest.raises(UsageError, match="has 1 image; give at least 2"):
        open_held_out(experiment(config))


def test_a_distance_that_would_not_end_is_refused_at_the_start(held_out, monkeypatch):
    monkeypatch.setattr(scores, "MOST_RANK", 63)
    programs = Programs(experiment(CONFIG), sharding.make_mesh(), terms=TERMS)
    with pytest.raises(UsageError, match=r"1,797 images of 64 features.*Inception's features"):
        HeldOut(programs, open_source(CONFIG.data), held_out)


def test_held_out_images_that_are_not_there_are_told_before_anything_is_made(tmp_path):
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, eval_source=str(tmp_path / "no")))
    with pytest.raises(UsageError, match="no"):
        train(experiment(config), tmp_path / "w")
    assert not (tmp_path / "w").exists()
