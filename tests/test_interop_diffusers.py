"""To diffusers and back: the same network in another library, whose forward pass in float64 is what ours is held to."""

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from interop import ROOT, convert, drawn, write_drawn_run
from test_unet import by_path, jit
from test_unet_parity import peer_of
from tiny import TINY, experiment, tiny

from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.core import rng
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.sharding import make_mesh
from ddpm_jax.diffusion.process import Process
from ddpm_jax.diffusion.schedules import BETAS
from ddpm_jax.evaluation.evaluation import Evaluation, Options
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.metrics import evaluate
from ddpm_jax.evaluation.results import describe
from ddpm_jax.interop.diffusers import read_model, write_pipeline
from ddpm_jax.interop.diffusers_config import from_diffusers_configs, scheduler_config, unet_config
from ddpm_jax.sampling import sample
from ddpm_jax.training.workdir import load_run

LEARNED_RANGE = {"variance": "learned_range", "loss": "rescaled_hybrid"}
GREY = tiny(model={"ch_mult": (1, 2, 2), "dropout": 0.0}, data={"image_size": 16})
LEARNED = tiny(
    data={"channels": 3, "image_size": 12},
    model={"ch": 24, "ch_mult": (1, 3), "num_res_blocks": 2, "attn_resolutions": (12, 6), "groups": 8},
    diffusion=LEARNED_RANGE,
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and diffusers, which are not ours to fix


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="an independent implementation to compare with: the extra `parity`")


@pytest.fixture(scope="module")
def diffusers(torch):
    return pytest.importorskip("diffusers", reason="an independent implementation to compare with: the extra `parity`")


def drawn_peer(config, torch, diffusers):
    """diffusers' network of the config, as diffusers builds it, every parameter drawn."""
    peer = peer_of(experiment(config).network, config.data.image_size, config.data.channels, diffusers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_((parameter.ndim == 1) + torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return peer.eval()


def outputs(config, params, peer, torch, batch=2):
    """(our output in float32, theirs in float64) for the same images and steps."""
    draws = np.random.default_rng(0)
    size, channels = config.data.image_size, config.data.channels
    x = draws.normal(size=(batch, size, size, channels)).astype(np.float32)
    t = draws.integers(0, 1000, batch).astype(np.int32)
    ours = jit(lambda params: experiment(config).network.apply({"params": params}, x, t))(params)
    with torch.no_grad():
        theirs = peer.double()(torch.tensor(x.transpose(0, 3, 1, 2)).double(), torch.tensor(t)).sample
    return np.asarray(ours), theirs.permute(0, 2, 3, 1).numpy()


def with_old_names(path):
    """Rewrites a weights file with the attention names of older versions."""
    tensors = safetensors.numpy.load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {re.sub(r"to_[qkv]|to_out\.0", lambda m: old[m[0]], name): a for name, a in tensors.items()}
    assert renamed.keys() != tensors.keys()
    safetensors.numpy.save_file(renamed, path)


# ---- In


@pytest.mark.parametrize(
    ("config", "kind"),
    [(GREY, "safetensors"), (GREY, "bin"), (LEARNED, "old_names")],
    ids=["grey", "bin", "learned_old_names"],
)
def test_imported_network_computes_what_diffusers_does(config, kind, torch, diffusers, tmp_path):
    peer = drawn_peer(config, torch, diffusers)
    peer.save_pretrained(tmp_path, safe_serialization=kind != "bin")
    if kind == "old_names":
        with_old_names(tmp_path / "diffusion_pytorch_model.safetensors")
    if config is LEARNED:
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"variance_type": "learned_range"}))
    read, params = read_model(str(tmp_path))
    assert unet_config(experiment(read)) == unet_config(experiment(config)) | {"dropout": 0.0}
    ours, theirs = outputs(read, params, peer, torch)
    assert abs(theirs).mean() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_full_network_is_imported_in_3_gb_and_its_time_printed(torch, diffusers, tmp_path, capsys):
    config = Config()
    peer = drawn_peer(config, torch, diffusers)
    peer.save_pretrained(tmp_path / "model")
    script = f"""
import re, sys, time
from pathlib import Path
sys.argv = ["convert.py", "from-diffusers", {str(tmp_path / "model")!r}, {str(tmp_path / "run")!r}]
sys.path.insert(0, {str(ROOT)!r})
start = time.perf_counter()
from ddpm_jax.commands import cli
cli.prepare("convert")()
# Not getrusage's maximum, which counts the process that started this one, too.
gigabytes = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
print(time.perf_counter() - start, time.process_time(), gigabytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, processor_seconds, gigabytes = map(float, done.stdout.split()[-3:])
    with capsys.disabled():
        print(
            f"\nImport of 35,746,307 parameters: {seconds:.1f} s ({processor_seconds:.1f} s of CPU), {gigabytes:.2f} GB"
        )
    assert gigabytes < 3
    run = load_run(tmp_path / "run")
    assert sum(a.size for a in jax.tree.leaves(run.params)) == 35_746_307
    ours, theirs = outputs(config, run.params, peer, torch, batch=1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A run of TINY: its EMA is drawn(TINY, seed=1), its raw parameters drawn(TINY)."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    write_drawn_run(workdir, TINY)
    return workdir


@pytest.fixture
def model(tiny_run, tmp_path):
    """`tiny_run` as a folder of diffusers."""
    convert("to-diffusers", tiny_run, tmp_path / "model")
    return tmp_path / "model"


def test_weights_in_half_precision_are_read(model):
    path = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: a.astype(np.float16) for name, a in tensors.items()}, path)
    _, params = read_model(str(model))
    for name, array in by_path(drawn(TINY, seed=1)).items():
        assert by_path(params)[name].dtype == np.float32
        np.testing.assert_array_equal(by_path(params)[name], array.astype(np.float16))


def test_a_hub_id_goes_through_the_hubs_cache(model, monkeypatch):
    asked = []
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: asked.append((name, allow_patterns)) or model
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    config, _ = read_model("someone/some-model")
    assert config.model == TINY.model
    [(name, patterns)] = asked
    assert name == "someone/some-model"
    assert not any(pattern.endswith((".bin", "*")) for pattern in patterns)  # a pickle only where nothing else is

    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match="has neither"):
        read_model("someone/some-model")
    assert [patterns[-1] for _, patterns in asked[1:]] == [
        f"*diffusion_pytorch_model.{e}" for e in ("safetensors", "bin")
    ]

    def offline(name, allow_patterns):
        raise OSError("no network\nand a long story")

    hub.snapshot_download = offline
    with pytest.raises(UsageError) as refusal:
        read_model("someone/some-model")
    sentence = (
        "someone/some-model is not a folder and could not be downloaded (no network); check the name and the network"
    )
    assert str(refusal.value) == sentence
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=re.escape('pip install "ddpm-jax[hub]"')):
        read_model("someone/some-model")


# ---- Out


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        tiny(data={"channels": 3}, diffusion=LEARNED_RANGE),
        tiny(data={"image_size": (12, 8), "channels": 5, "value_range": (0, 1)}),
    ],
    ids=["grey", "learned", "of_any_image"],
)
def test_ours_to_diffusers_to_ours_is_bit_identical(config, tmp_path):
    write_drawn_run(tmp_path / "run", config)
    convert("to-diffusers", tmp_path / "run", tmp_path / "model")
    convert("from-diffusers", tmp_path / "model", tmp_path / "back")
    back = load_run(tmp_path / "back")
    assert (back.config.model, back.config.diffusion) == (config.model, config.diffusion)
    assert back.experiment.image_shape == experiment(config).image_shape
    for name, array in by_path(drawn(config, seed=1)).items():
        assert np.asarray(array).tobytes() == np.asarray(by_path(back.params)[name]).tobytes()


@pytest.mark.parametrize("schedule", BETAS)
def test_a_model_is_taken_back_with_the_config_that_it_came_from(schedule, tiny_run, tmp_path):
    """Whatever fields of the schedule its betas do not depend on."""
    config = tiny(diffusion={"schedule": schedule, "prediction": "x_0"}, train={"lr": 0.5})
    write_pipeline(dataclasses.replace(load_run(tiny_run), experiment=experiment(config)), tmp_path / "model", "")
    assert read_model(str(tmp_path / "model"), config)[0] == config
    with pytest.raises(UsageError, match=r"it differs in .*diffusion\.T \(20 there, 21 in the config\)"):
        read_model(str(tmp_path / "model"), tiny(diffusion={"T": 21, "schedule": schedule, "prediction": "x_0"}))


def test_diffusers_is_given_the_ema_unless_raw_is_asked_for(tiny_run, model, tmp_path):
    convert("to-diffusers", tiny_run, tmp_path / "raw", "--weights", "raw")
    for folder, seed in [(model, 1), (tmp_path / "raw", 0)]:
        jax.tree.map(np.testing.assert_array_equal, read_model(str(folder))[1], drawn(TINY, seed=seed))


RGB = {"channels": 3}


@pytest.mark.parametrize(
    ("diffusion", "data"),
    [
        ({"variance": "fixed_large"}, RGB),
        ({"variance": "fixed_small", "schedule": "const", "beta_end": 0.3, "prediction": "x_0"}, RGB),
        ({"variance": "learned_range", "loss": "hybrid", "schedule": "cosine", "prediction": "v"}, RGB),
        ({"variance": "fixed_large"}, {"image_size": (8, 12), "channels": 4}),
    ],
    ids=lambda d: "-".join(map(str, d.values())),
)
def test_diffusers_pipeline_samples_what_ancestral_sampling_does(
    diffusion, data, diffusers, torch, tmp_path, monkeypatch
):
    config = tiny(diffusion=diffusion, data=data)
    write_drawn_run(tmp_path / "run", config)
    convert("to-diffusers", tmp_path / "run", tmp_path / "model")
    run = load_run(tmp_path / "run")
    B, shape, T = 2, run.experiment.image_shape, config.diffusion.T
    key = jax.random.key(0)
    d = config.diffusion
    process = Process(run.experiment.process.schedule, prediction=d.prediction, variance=d.variance)

    def generate(params, indices):
        return sample(process, dataclasses.replace(run, params=params).model, key, indices, image_shape=shape)

    ours = jit(generate)(run.params, jnp.arange(B))

    # k = 0 is x_T, then one draw for each step with noise: all but the last.
    keys = rng.image_keys(key, jnp.arange(B))
    draws = iter([np.array(rng.image_normal(keys, k, shape)).transpose(0, 3, 1, 2) for k in range(T)])
    for module in (diffusers.pipelines.ddpm.pipeline_ddpm, diffusers.schedulers.scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: torch.tensor(next(draws)[:, : shape[1]]))
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=B, num_inference_steps=T, output_type="np").images
    assert next(draws, None) is None
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(2 * theirs - 1, np.clip(ours, -1, 1), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_model_card_has_config_step_and_evaluation(tiny_run, tmp_path, monkeypatch):
    """The very files that evaluate.py writes."""
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    workdir = epath.Path(shutil.copytree(tiny_run, tmp_path / "run"))
    options = Options(num_images=12, num_real=20, batch_size=12, bootstrap=0)
    run = load_run(workdir, mesh=make_mesh(devices=jax.devices()[:1]))
    result = evaluate(Evaluation.of_run(run, workdir, PIXELS, options), ("fid",))["fid"]
    later = json.loads(json.dumps(result | {"value": 9.75}))
    later["definition"]["sampling"]["step"] = 7
    (workdir / "evaluation/fid-00000007-00000000.json").write_text(json.dumps(later))
    convert("to-diffusers", workdir, tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert "the moving average of the parameters of step 0" in card
    assert "trained with" not in card  # which this was not, nor is what was imported
    of = "12 samples, ancestral, 20 steps, seed 0; pixels; 20 images of digits"
    assert f"| fid | {describe(result)} | {of} |" in card
    assert "9.75" not in card  # of another step
    assert json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])["model"]["ch"] == TINY.model.ch
    assert f"num_inference_steps={TINY.diffusion.T}" in card
    convert("to-diffusers", workdir, tmp_path / "raw", "--weights", "raw")
    assert "Not evaluated" in (tmp_path / "raw/README.md").read_text()  # what was evaluated is the EMA
    (workdir / "evaluation/fid-00000007-00000000.json").write_text("{")
    convert("to-diffusers", workdir, tmp_path / "again")  # a damaged result is left out
    assert f"| fid | {describe(result)} | {of} |" in (tmp_path / "again/README.md").read_text()


@pytest.mark.parametrize(
    ("diffusion", "named"),
    [
        ({"variance": "learned", "loss": "hybrid"}, "diffusion.variance=learned, only of fixed_small"),
        ({"prediction": "x_prev"}, "diffusion.prediction=x_prev, only of eps"),
    ],
)
def test_what_diffusers_cannot_sample_is_refused(diffusion, named, tiny_run, tmp_path):
    run = dataclasses.replace(load_run(tiny_run), experiment=experiment(tiny(diffusion=diffusion)))
    with pytest.raises(UsageError, match=named):
        write_pipeline(run, tmp_path / "model", "")
    assert list(tmp_path.iterdir()) == []


# ---- Configs


def test_config_of_the_hubs_cifar10_model_is_the_papers():
    levels = ["", "Attn", "", ""]
    unet = {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [128, 256, 256, 256],
        "center_input_sample": False,
        "down_block_types": [f"{attend}DownBlock2D" for attend in levels],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": [f"{attend}UpBlock2D" for attend in levels[::-1]],
    }
    read = from_diffusers_configs(unet, {"variance_type": "fixed_large"})
    paper = load_config(str(ROOT / "configs/cifar10.py"))
    assert dataclasses.replace(read.model, dropout=paper.model.dropout) == paper.model
    assert read.diffusion == paper.diffusion


def test_every_schedule_has_the_same_betas_in_diffusers(diffusers):
    for schedule in BETAS:
        config = tiny(diffusion={"T": 1000, "schedule": schedule, "prediction": "x_0"})
        theirs = diffusers.DDPMScheduler.from_config(scheduler_config(experiment(config))).betas.numpy()
        np.testing.assert_allclose(theirs, experiment(config).process.schedule.betas, rtol=1e-5, err_msg=schedule)


@pytest.mark.parametrize("schedule", BETAS)
def test_every_sampler_that_diffusers_has_comes_back(schedule):
    for prediction, variance in itertools.product(("eps", "x_0", "v"), ("fixed_small", "fixed_large", "learned_range")):
        if schedule == "jsd" and prediction != "x_0":
            continue  # there x_0 does not follow from eps or v
        loss = "rescaled_hybrid" if variance == "learned_range" else "simple"
        diffusion = DiffusionConfig(100, schedule, prediction=prediction, variance=variance, loss=loss)
        config = Config(data=DataConfig(source="none"), model=ModelConfig(dropout=0.3), diffusion=diffusion)
        given = json.loads(json.dumps([unet_config(experiment(config)), scheduler_config(experiment(config))]))
        read = from_diffusers_configs(*given)
        betas = experiment(config).process.schedule.betas
        np.testing.assert_allclose(experiment(read).process.schedule.betas, betas, rtol=1e-12)
        # The same betas may have another name.
        same = {"schedule": schedule, "beta_start": 1e-4, "beta_end": 0.02}
        assert dataclasses.replace(read, diffusion=dataclasses.replace(read.diffusion, **same)) == config
