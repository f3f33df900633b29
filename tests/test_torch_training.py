"""The same recipe in PyTorch: its updates are ours from the same weights, and both sides are trained, judged and compared."""

import ast
import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import drawn
from scipy import stats
from tiny import experiment, one_device, tiny

from ddpm_jax.core.errors import UsageError
from ddpm_jax.interop.diffusers_config import scheduler_config, unet_config
from ddpm_jax.interop.names import parameters
from ddpm_jax.training import step as training
from ddpm_jax.training.parameters import flatten

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "results" / "torch_training"
sys.path.append(str(FOLDER))

import compare  # noqa: E402
import report  # noqa: E402

MODEL = {"ch_mult": (1,), "attn_resolutions": (8,), "dropout": 0.0}
CONFIG = tiny(
    model=MODEL,
    diffusion={"T": 10, "variance": "fixed_small"},
    train={"steps": 10, "log_every": 2, "flip": False, "ema_warmup": True},
)
OURS, THEIRS = [0.081, 0.082, 0.0835], [0.0815, 0.0822, 0.0828]

# ---- The comparison and its words


def test_welch_is_its_formula():
    found = report.welch(OURS, THEIRS)
    (a, b), (u, v) = map(np.mean, (OURS, THEIRS)), (np.var(x, ddof=1) / 3 for x in (OURS, THEIRS))
    error, freedom = math.sqrt(u + v), (u + v) ** 2 / (u**2 / 2 + v**2 / 2)
    t = (a - b) / error
    reach = stats.t.ppf(0.975, freedom) * error
    np.testing.assert_allclose(
        [found["difference"], found["t"], found["p"]], [a - b, t, 2 * stats.t.sf(abs(t), freedom)]
    )
    np.testing.assert_allclose(found["interval"], [a - b - reach, a - b + reach])
    assert found["pytorch"] == pytest.approx({"mean": b, "deviation": math.sqrt(3 * v)})


def result_of(measures):
    """A result with these measures: name -> (ours, theirs)."""
    return {
        "config": dataclasses.asdict(CONFIG),
        "seeds": [0, 1, 2],
        "images": 99,
        "data": {"images": 1797},
        "hardware": "a machine",
        "software": {"python": "3", "jax": "1", "torch": "2", "diffusers": "4", "device": "1 cpu"},
        "cpu_seconds": {"ddpm_jax": [60, 120, 180], "pytorch": [240, 300, 360]},
        "comparison": {name: report.welch(*values) for name, values in measures.items()},
    }


def test_the_page_has_the_numbers_and_says_whether_the_sides_differ():
    same = report.page(result_of({"loss": (OURS, THEIRS), "distance": (THEIRS, OURS)}))
    assert "| loss | 0.0822 ± 0.0013 | 0.0822 ± 0.0007 | +0.0 % (" in same
    assert "No difference goes beyond what seeds explain" in same
    assert "99 samples in all 10 steps" in " ".join(same.split())
    assert "in 21 minutes of processor time" in " ".join(same.split())
    off = report.page(result_of({"loss": (OURS, THEIRS), "distance": ([9.0, 9.1, 9.2], [10.0, 10.1, 10.2])}))
    found = "There is a difference that goes beyond what seeds explain. The least p of the 2 measures is below 0.001 (distance)."
    assert found in " ".join(off.split())
    assert "| 9.10 ± 0.10 | 10.10 ± 0.10 | -9.9 % (-12.1 to -7.7) | -12.2 | below 0.01 |" in off
    assert max(map(len, off.splitlines())) < 131


@pytest.mark.parametrize(("count", "said"), [(1, "There is a difference"), (100, "No difference")])
def test_many_measures_are_given_many_chances(count, said):
    low = report.welch([9.0, 9.1, 9.2], [9.3, 9.4, 9.5])
    assert 0.01 < low["p"] < 0.05
    other = report.welch(OURS, THEIRS)
    assert report.verdict({"low": low} | {f"{i}": other for i in range(1, count)}).startswith(said)


def test_the_recipe_in_pytorch_imports_nothing_of_ours():
    tree = ast.parse((FOLDER / "torch_recipe.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"collections", "copy", "diffusers", "numpy", "torch", "typing"}


def test_the_document_says_what_the_result_says():
    assert (ROOT / "docs" / "torch_training.md").read_text() == report.page(
        compare.read_result(FOLDER / "comparison.json")
    )


# ---- The recipe in PyTorch


@pytest.fixture(scope="module")
def torch():
    reason = "the other side: install the extra `parity`"
    pytest.importorskip("diffusers", reason=reason)
    return pytest.importorskip("torch", reason=reason)


def peer_of(config, seed=0):
    from torch_recipe import Training

    of = experiment(config)
    return Training(unet_config(of), scheduler_config(of), dataclasses.asdict(config.train), seed)


def here(config, tensors):
    """Tensors in the order of the network's parameters, by our paths."""
    state = dict(zip(tensors.keys(), (tensor.detach().numpy() for tensor in tensors.values()), strict=True))
    return {p.path: p.from_diffusers(state[p.diffusers]) for p in parameters(experiment(config))}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_five_steps_in_pytorch_are_ours_from_the_same_weights_and_draws(torch):
    """Noise, loss, clipping, Adam, warm-up and the EMA's decays: some gradients are clipped, the warm-up and the EMA's end."""
    options = {"lr": 1e-2, "warmup_steps": 2, "adam_eps": 1e-3, "grad_clip": 1.3, "ema_decay": 0.3}
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **options))
    of, start = experiment(config), drawn(config)
    peer, before = peer_of(config), flatten(start)
    table = {p.diffusers: torch.tensor(p.to_diffusers(before[p.path]).copy()) for p in parameters(of)}
    peer.network.load_state_dict(table, strict=True)
    peer.ema.shadow_params = [parameter.detach().clone() for parameter in peer.parameters]
    names = [name for name, _ in peer.network.named_parameters()]

    def tensor(array):
        return torch.tensor(np.asarray(array)).permute(0, 3, 1, 2)

    train_step, norms = training.make_train_step(of, mesh=one_device()), []
    state = training.state_from_params(of, jax.tree.map(jnp.asarray, start))
    for step, images in enumerate(np.random.default_rng(0).integers(0, 256, (5, 16, 8, 8, 1)).astype(np.uint8)):
        draws = training.draw(of, jnp.int32(step), images.shape, None)
        state, metrics = train_step(state, images[None], None)
        norms += metrics["grad_norm"].tolist()
        loss = peer.step(tensor(images).float() / 127.5 - 1, torch.tensor(np.asarray(draws.t)), tensor(draws.eps))
        np.testing.assert_allclose(loss, metrics["loss"][0], rtol=1e-5)
        for ours, theirs in ((state.params, peer.parameters), (state.ema_params, peer.ema.shadow_params)):
            after = here(config, dict(zip(names, theirs, strict=True)))
            for path, array in flatten(jax.device_get(ours)).items():
                np.testing.assert_allclose(after[path], array, rtol=0, atol=2e-5, err_msg=f"{step} {path}")
    assert min(norms) < options["grad_clip"] < max(norms)
    assert max(abs(array - before[path]).max() for path, array in flatten(jax.device_get(state.params)).items()) > 0.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_initial_weights_have_our_distribution(torch):
    config = tiny(model={"ch": 32, "groups": 8})
    ours = flatten(jax.device_get(jax.jit(experiment(config).init)(jax.random.key(0))))
    theirs = here(config, dict(peer_of(config).network.named_parameters()))
    assert ours.keys() == theirs.keys()
    for path, array in ours.items():
        if array.size < 500 and not path.endswith("kernel"):
            np.testing.assert_array_equal(theirs[path], array, err_msg=path)  # zeros and ones
        else:
            spread, reach = (np.std(theirs[path]) / np.std(array), abs(theirs[path]).max() / abs(array).max())
            assert abs(spread - 1) < 4 / math.sqrt(array.size), path
            assert abs(reach - 1) < 20 / array.size + 0.005, path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_every_epoch_has_every_image_once_in_another_order(torch):
    from torch_recipe import places

    drawn = torch.cat([*itertools.islice(places(10, 4), 5)]).numpy()  # the third batch is of two epochs
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [*range(10)]
    assert (drawn[:10] != drawn[10:]).any()


# ---- Both sides


@pytest.fixture(scope="module")
def compared(torch, tmp_path_factory):
    """The options of a comparison of tiny trainings that has been made."""
    folder = tmp_path_factory.mktemp("compared")
    options = compare.Options(
        seeds=(0, 1), num_images=80, workdir=folder / "runs", result=folder / "c.json", page=folder / "page.md"
    )
    compare.main(options, CONFIG)
    return options


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_both_sides_are_trained_and_judged(compared):
    result = compare.read_result(compared.result)
    assert compared.page.read_text() == report.page(result)
    assert {side: len(runs) for side, runs in result["measures"].items()} == {"ddpm_jax": 2, "pytorch": 2}
    for run in itertools.chain(*result["measures"].values()):
        assert len(run) == 12
        for weights in compare.WEIGHTS.values():
            quarters = [run[f"loss, {weights}, quarter {i} of t"] for i in range(1, 5)]
            assert run[f"loss, {weights}"] == pytest.approx(np.mean(quarters))
        # Ten steps change little: the network puts out nearly nothing, and the loss is the noise's power.
        assert all(0.5 < value < 1.5 for name, value in run.items() if "loss" in name)
        assert run["Fréchet distance of pixels, EMA"] > 1
    assert result["measures"]["pytorch"][0] != result["measures"]["pytorch"][1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_those_of_another_config_refused(compared, monkeypatch):
    def train(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(compare, "TRAINERS", {side: train for side in report.SIDES})
    before = compared.result.read_bytes()
    compared.result.unlink()
    compare.main(compared, CONFIG)
    assert compared.result.read_bytes() == before
    with pytest.raises(UsageError, match=r"ddpm_jax_0\.json is of another config or number of images"):
        compare.main(dataclasses.replace(compared, num_images=81), CONFIG)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_pytorchs_weights_and_samples_are_the_ones_it_trained(torch, tmp_path):
    """What is judged is what PyTorch says of itself: its loss with the imported weights, and its pipeline's images."""
    from diffusers import DDPMPipeline

    trained = compare.train_torch(CONFIG, tmp_path / "run", 8)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run" / "ema")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(CONFIG.seed)
    images = pipeline(batch_size=8, generator=generator, num_inference_steps=10, output_type="np").images
    np.testing.assert_array_equal(trained.samples, np.round(images * 255))
    x, t = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32), np.array([0, 4, 9], np.int32)
    with torch.no_grad():
        theirs = pipeline.unet(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t)).sample.permute(0, 2, 3, 1)
    for weights, same in (("ema", True), ("raw", False)):
        ours = experiment(CONFIG).model(jax.tree.map(jnp.asarray, trained.params[weights]))(x, t)
        assert np.allclose(ours, theirs.numpy(), rtol=0, atol=1e-5) == same


def test_one_seed_has_no_spread_and_is_refused():
    for seeds in ((0,), (1, 1)):
        with pytest.raises(UsageError, match="expected two or more different ones"):
            compare.main(compare.Options(seeds=seeds))


def test_a_changed_result_is_refused(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"seeds": [0, 1], "sha256": "0"}))
    with pytest.raises(UsageError, match="not what was written there"):
        compare.read_result(tmp_path / "c.json")
