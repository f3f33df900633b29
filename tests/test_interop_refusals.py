"""What convert.py is given and cannot use: one sentence, exit code 2, nothing executed, nothing overwritten."""

import errno
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from interop import ROOT, convert, drawn, write_drawn_run
from tiny import TINY, experiment, tiny

from ddpm_jax.commands import cli
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.evaluation.inception_weights import load_inception
from ddpm_jax.interop.diffusers import read_model
from ddpm_jax.interop.diffusers_config import from_diffusers_configs, scheduler_config, unet_config
from ddpm_jax.interop.names import parameters
from ddpm_jax.interop.tensorflow import _told
from ddpm_jax.training import workdir as workdirs
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.parameters import flatten
from ddpm_jax.training.step import state_from_params
from ddpm_jax.training.workdir import write_run

SAFETENSORS, BIN = (f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "bin"))


@pytest.fixture
def model(tmp_path):
    """A folder of diffusers, as older versions write it: config, scheduler and weights side by side."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(unet_config(experiment(TINY))))
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler_config(experiment(TINY))))
    arrays = flatten(drawn(TINY))
    tensors = {p.diffusers: np.ascontiguousarray(p.to_diffusers(arrays[p.path])) for p in parameters(experiment(TINY))}
    safetensors.numpy.save_file(tensors, folder / SAFETENSORS)
    return folder


@pytest.fixture
def refused(model, tmp_path):
    """Checks that importing the model is refused with this sentence and leaves no workdir."""

    def refused(sentence):
        with pytest.raises(UsageError) as refusal:
            convert("from-diffusers", model, tmp_path / "run")
        assert str(refusal.value).replace(str(model), "MODEL").startswith(sentence)
        assert not (tmp_path / "run").exists()

    return refused


# ---- Files


def test_malicious_pickle_is_refused_and_not_executed(model, refused, tmp_path):
    torch = pytest.importorskip("torch", reason="what reads .bin files: the extra `torch`")
    witness = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {witness}",)

    (model / SAFETENSORS).unlink()
    holds = "is damaged or holds something other than weights, so it was not used"
    sentence = f"MODEL/{BIN} {holds}; get {SAFETENSORS} instead"
    (model / BIN).write_bytes(pickle.dumps(Malicious()))
    refused(sentence)
    torch.save({"conv_in.weight": Malicious()}, model / BIN)  # the same in a zip
    refused(sentence)
    assert not witness.exists()
    with zipfile.ZipFile(model / BIN) as archive:  # it would have been executed
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        pickle.load(io.BytesIO(archive.read(name)))
    assert witness.exists()


def test_pickle_without_pytorch_is_refused(model, refused, monkeypatch):
    (model / SAFETENSORS).rename(model / BIN)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(f"MODEL/{BIN} needs torch, which cannot be imported")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_safetensors_is_refused(kept, model, tmp_path):
    content = (model / SAFETENSORS).read_bytes()
    (model / SAFETENSORS).write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(
        UsageError, match=rf"^{model}/{SAFETENSORS} cannot be read \(.*\); get a whole copy of the file$"
    ):
        convert("from-diffusers", model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folder_without_config_or_weights_is_refused(model, refused):
    (model / SAFETENSORS).unlink()
    refused(f"MODEL has neither {SAFETENSORS} nor {BIN}; give the folder of a whole diffusers model")
    (model / "config.json").write_text("[1, 2]")
    refused("MODEL/config.json is damaged (it holds a JSON list, expected dict); get a whole copy of the file")
    (model / "config.json").write_text('{"act_fn": ')
    refused(
        "MODEL/config.json is damaged (it is not JSON: Expecting value: line 1 column 12 (char 11)); "
        "get a whole copy of the file"
    )
    (model / "config.json").unlink()
    refused("MODEL has no config.json; give the folder of a diffusers model")


@pytest.mark.parametrize(
    "there", [b"", b"[" * 100_000, b"\xff{}", b'{"norm_eps": NaN}', bytes(100)], ids=lambda b: repr(b[:20])
)
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_a_damaged_config_of_diffusers_is_told(name, there, model, tmp_path):
    (model / name).write_bytes(there)
    with pytest.raises(UsageError, match=rf"^{model / name} is damaged \(.*\); get a whole copy of the file$"):
        convert("from-diffusers", model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def of_header(values, body=b""):
    header = values if isinstance(values, bytes) else json.dumps(values).encode()
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize(
    "content",
    [
        (2**60).to_bytes(8, "little") + b"{}",
        of_header(b"[" * 100_000),
        of_header(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4)),
        of_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        of_header({"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, bytes(4)),
        of_header({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        of_header({"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
        of_header(b"\xff\xfe"),
    ],
    ids=lambda content: repr(content[8:60]),
)
def test_damaged_headers_of_safetensors_are_told(content, model, tmp_path):
    """Of a model and of the Inception weights."""
    (model / SAFETENSORS).write_bytes(content)
    with pytest.raises(
        UsageError, match=rf"^{model / SAFETENSORS} .*(get the weights unquantised|a whole copy of the file)$"
    ):
        convert("from-diffusers", model, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match=rf"^{model / SAFETENSORS} cannot be read as safetensors"):
        load_inception(model / SAFETENSORS)


def test_tensors_that_do_not_fit_are_named(model, refused):
    tensors = safetensors.numpy.load_file(model / SAFETENSORS)
    end = "; use the config that it was trained with, or a whole copy of the file"
    for changed, message in [
        ({"conv_in.bias": None}, "conv_in.bias is missing"),
        ({"conv_in.gain": np.zeros(2, np.float32)}, "conv_in.gain is not of this network"),
        ({"conv_in.bias": np.zeros((8, 1), np.float32)}, "conv_in.bias has shape (8, 1), expected (8,)"),
    ]:
        kept = {name: array for name, array in (tensors | changed).items() if array is not None}
        safetensors.numpy.save_file(kept, model / SAFETENSORS)
        refused(f"MODEL/{SAFETENSORS} does not fit the network of its config: {message}{end}")
    whole = tensors | {"conv_in.bias": np.zeros(8, np.int8)}
    safetensors.numpy.save_file(whole, model / SAFETENSORS)
    refused(f"MODEL/{SAFETENSORS} holds conv_in.bias as int8, expected floating point; get the weights unquantised")


def test_numbers_of_a_kind_that_numpy_has_not_are_refused(model, tmp_path):
    header = json.dumps({"conv_in.bias": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (model / SAFETENSORS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(UsageError, match=r"holds a type that NumPy lacks \(.*float8.*\); get the weights unquantised"):
        convert("from-diffusers", model, tmp_path / "run")


def test_an_error_of_tensorflow_without_a_word_is_told_by_its_kind():
    with pytest.raises(UsageError, match=r"cannot be read as a TensorFlow checkpoint \(RuntimeError\)"), _told("x"):
        raise RuntimeError


def test_the_current_folder_is_not_replaced_by_a_model(tmp_path, monkeypatch):
    write_drawn_run(tmp_path / "run", TINY)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"^\. cannot be replaced by a folder; give the name of a new one"):
        convert("to-diffusers", "../run", ".")


def test_no_source_is_told_from_a_hub_id(tmp_path):
    for source in (f"{tmp_path}/nowhere", "nowhere", "./a/b"):
        with pytest.raises(UsageError) as refusal:
            read_model(source)
        give = "give one with a config.json, or a hub id such as google/ddpm-cifar10-32"
        assert str(refusal.value) == f"{source} is not a folder; {give}"


# ---- Folders that are not empty, and disks that are full


def test_occupied_workdir_or_folder_is_refused_and_left_alone(model, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    convert("from-diffusers", model, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    convert("to-diffusers", tmp_path / "run", tmp_path / "empty")  # an empty folder is as good as none
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {
        "README.md",
        "model_index.json",
        "scheduler",
        "unet",
    }
    for arguments in [
        ("from-diffusers", model, occupied),
        ("from-tensorflow", tmp_path / "model.ckpt-1", occupied, "--config", "configs/cifar10.py"),
        ("to-diffusers", tmp_path / "run", occupied),
    ]:
        with pytest.raises(UsageError) as refusal:
            convert(*arguments)
        assert str(refusal.value) == f"{occupied} is not empty; choose a new folder"
    for ending in (".safetensors", ".jax_export"):
        file = tmp_path / f"mine{ending}"
        file.write_text("mine")
        with pytest.raises(UsageError, match=f"^{file} exists; choose another name, or move it away$"):
            convert("export", tmp_path / "run", file)
        assert file.read_text() == "mine"
    assert [path.name for path in occupied.iterdir()] == ["mine.txt"]
    with pytest.raises(
        UsageError, match=r"expected one that ends in .safetensors \(parameters\) or .jax_export \(sampler\)$"
    ):
        convert("export", tmp_path / "run", tmp_path / "model.bin")


def test_import_that_fails_leaves_no_workdir(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    state = state_from_params(experiment(TINY), drawn(TINY))
    monkeypatch.setattr(workdirs, "write_text", full)  # the config, when the checkpoint lies there
    with pytest.raises(UsageError, match="cannot be written"):
        write_run(tmp_path / "run", experiment(TINY), state)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Checkpoints, "save", lambda *_: (_ for _ in ()).throw(RunError("the disk is full")))
    with pytest.raises(RunError, match="the disk is full"):
        write_run(tmp_path / "run", experiment(TINY), state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/new", "n" * 300, "/proc/new"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(place, model, tmp_path, monkeypatch):
    write_drawn_run(tmp_path / "run", TINY)
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("ddpm_jax.commands.convert.load_run", None)
    monkeypatch.setattr("ddpm_jax.interop.diffusers.read_model", None)
    for arguments in [
        ("from-diffusers", model, tmp_path / place),
        ("from-tensorflow", tmp_path / "ckpt", tmp_path / place, "--config", "configs/cifar10.py"),
        ("to-diffusers", tmp_path / "run", tmp_path / place),
        ("export", tmp_path / "run", tmp_path / f"{place}.safetensors"),
        ("export", tmp_path / "run", tmp_path / place / "sampler.jax_export"),
    ]:
        with pytest.raises(UsageError, match=r"cannot be written \(.*\); give another"):
            convert(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("arguments", [("to-diffusers", "new"), ("export", "new.safetensors")], ids=lambda a: a[0])
def test_a_disk_that_refuses_leaves_nothing_and_is_told_in_one_sentence(
    number, arguments, tmp_path, monkeypatch, capsys
):
    write_drawn_run(tmp_path / "run", TINY)
    write, written = Path.write_bytes, []

    def refuse(self, content):
        written.append(write(self, content[:100]))
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", refuse)
    monkeypatch.setattr(sys, "argv", ["convert.py", arguments[0], str(tmp_path / "run"), str(tmp_path / arguments[1])])
    with pytest.raises(SystemExit) as end:
        cli.run("convert")
    assert end.value.code == 1
    assert written
    said = capsys.readouterr().err
    assert said.startswith("convert.py: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- Configs


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05, expected 1e-06"),
        (
            {"freq_shift": 0, "flip_sin_to_cos": True},
            "flip_sin_to_cos is true, expected false, freq_shift is 0, expected 1",
        ),
        ({"downsample_padding": 1}, "downsample_padding is 1, expected 0"),
        ({"attention_head_dim": 8}, "attention_head_dim is 8, expected null"),
        ({"class_embed_type": "timestep"}, 'class_embed_type is "timestep", expected null'),
        ({"attn_norm_num_groups": 2}, "attn_norm_num_groups is 2, expected null"),
        ({"time_embedding_type": "fourier"}, 'time_embedding_type is "fourier", expected "positional"'),
        ({"time_embedding_dim": 33}, "time_embedding_dim is 33, expected null"),
        ({"resnet_time_scale_shift": "scale_shift"}, 'resnet_time_scale_shift is "scale_shift", expected "default"'),
        ({"down_block_types": ["DownBlock2D", "ResnetDownsampleBlock2D"]}, "down_block_types is"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types is"),
        ({"block_out_channels": [8, 12]}, "block_out_channels is [8, 12], expected [8, 8]"),
        ({"out_channels": 2}, "out_channels is 2, expected 1"),
        ({"_class_name": "UNet2DConditionModel"}, '_class_name is "UNet2DConditionModel", expected "UNet2DModel"'),
        ({"mid_block_type": None}, 'mid_block_type is null, expected "UNetMidBlock2D"'),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow is 3, expected null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_network_that_ours_cannot_be_is_refused_by_its_fields(changed, fields):
    with pytest.raises(UsageError) as refusal:
        from_diffusers_configs(unet_config(experiment(TINY)) | changed, scheduler_config(experiment(TINY)))
    assert str(refusal.value).startswith("its network is not one of ddpm_jax: ")
    assert fields in str(refusal.value)


def test_fields_that_are_left_out_mean_what_diffusers_takes_them_for():
    left_out = {
        "attention_head_dim": 8,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_eps": 1e-5,
    }
    unet = unet_config(experiment(TINY))
    for name, value in left_out.items():
        with pytest.raises(UsageError, match=f"{name} is {json.dumps(value)}, expected"):
            from_diffusers_configs({n: v for n, v in unet.items() if n != name}, {})
    for name in unet.keys() - left_out.keys() - {"_class_name", "_diffusers_version", "sample_size"}:
        if name not in {"block_out_channels", "down_block_types", "up_block_types", "in_channels", "out_channels"}:
            rest = {n: v for n, v in unet.items() if n != name}
            from_diffusers_configs(rest | {"layers_per_block": 1, "norm_num_groups": 4}, {})


def test_other_words_for_our_network_are_understood():
    words = {"act_fn": "swish", "attention_head_dim": 16, "attn_norm_num_groups": 4, "sample_size": [8, 8]}
    words |= {"time_embedding_dim": 32, "num_train_timesteps": 20, "a_field_of_tomorrow": False, "_note": "x"}
    read = from_diffusers_configs(unet_config(experiment(TINY)) | words, scheduler_config(experiment(TINY)))
    assert (read.model, read.diffusion) == (TINY.model, TINY.diffusion)
    assert (
        from_diffusers_configs(unet_config(experiment(TINY)), {"variance_type": "fixed_small_log"}).diffusion.variance
        == "fixed_small"
    )


@pytest.mark.parametrize(
    ("changed", "fields"),
    [
        ({"clip_sample": False}, "clip_sample is false, expected true"),
        ({"thresholding": True}, "thresholding is true, expected false"),
        ({"_class_name": "PNDMScheduler"}, '_class_name is "PNDMScheduler", expected "DDPMScheduler"'),
        (
            {"variance_type": "learned"},
            'variance_type is "learned", expected one of fixed_small, fixed_large, learned_range',
        ),
        ({"beta_schedule": "laplace"}, 'beta_schedule is "laplace", expected one of linear, scaled_linear'),
        ({"trained_betas": [0.1] * 19 + [0.3]}, "trained_betas match no schedule"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sampler_that_ours_cannot_be_is_refused_by_its_fields(changed, fields):
    with pytest.raises(UsageError) as refusal:
        from_diffusers_configs(unet_config(experiment(TINY)), scheduler_config(experiment(TINY)) | changed)
    assert str(refusal.value).startswith("its sampler")
    assert fields in str(refusal.value)


@pytest.mark.parametrize(
    "broken",
    [
        {"block_out_channels": 8},
        {"block_out_channels": []},
        {"sample_size": "8"},
        {"layers_per_block": "1"},
        {"num_class_embeds": 0},
    ],
    ids=str,
)
def test_config_of_wrong_types_is_refused(broken, model, tmp_path):
    (model / "config.json").write_text(json.dumps(unet_config(experiment(TINY)) | broken))
    with pytest.raises(UsageError, match=f"^{model} cannot be imported: "):
        convert("from-diffusers", model, tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "broken"),
    [
        ("config.json", {"layers_per_block": 10**9}),
        ("config.json", {"block_out_channels": [8] * 10**6}),
        ("config.json", {"block_out_channels": [10**9, 10**9]}),
        ("config.json", {"sample_size": 10**9}),
        ("config.json", {"in_channels": 10**9, "out_channels": 10**9}),
        ("config.json", {"down_block_types": ["DownBlock2D"] * 10**6}),
        ("scheduler_config.json", {"num_train_timesteps": 10**12}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_network_beyond_all_bounds_is_refused_before_anything_is_built(file, broken, model, monkeypatch):
    values = json.loads((model / file).read_text())
    (model / file).write_text(json.dumps(values | broken))
    monkeypatch.setattr("ddpm_jax.interop.diffusers_config.Config", None)
    with pytest.raises(
        UsageError, match=f"^{model} cannot be imported: its .*{next(iter(broken))} is .* from 1 to|no list of 1 to"
    ):
        read_model(str(model))


@pytest.mark.parametrize(
    ("base", "variance"), [(None, "learned_range"), ("learned", "learned"), ("learned_range",) * 2]
)
def test_two_outputs_a_channel_without_a_scheduler_are_a_learned_variance(base, variance, model):
    """Learned as a share of the range, or as the config says."""
    learned = tiny(
        diffusion={"variance": variance, "loss": "rescaled_hybrid", "T": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    )
    arrays = flatten(drawn(learned))
    tensors = {
        p.diffusers: np.ascontiguousarray(p.to_diffusers(arrays[p.path])) for p in parameters(experiment(learned))
    }
    safetensors.numpy.save_file(tensors, model / SAFETENSORS)
    (model / "config.json").write_text(json.dumps(unet_config(experiment(learned))))
    (model / "scheduler_config.json").unlink()
    config, params = read_model(str(model), learned if base else None)
    assert (config.diffusion.variance, config.diffusion.prediction) == (variance, "eps")
    assert flatten(params).keys() == arrays.keys()
    fixed = tiny(diffusion={"T": 1000, "beta_start": 1e-4, "beta_end": 0.02})
    with pytest.raises(UsageError, match=r"diffusion.variance \('learned_range' there, 'fixed_large' in the config\)"):
        read_model(str(model), fixed)


def test_config_of_another_model_is_refused(model):
    assert read_model(str(model), TINY)[0] == TINY  # its data and training options, too
    with pytest.raises(UsageError) as refusal:
        read_model(str(model), tiny(diffusion={"T": 30}, train={"lr": 0.5}))
    assert str(refusal.value) == (
        f"{model} is not the config's model: it differs in diffusion.T (20 there, 30 in the config); change the config"
    )


# ---- The command line


def test_refusal_is_one_sentence_and_exit_code_2(tmp_path):
    command = [sys.executable, "convert.py", "from-diffusers", str(tmp_path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    sentence = f"convert.py: {tmp_path} has no config.json; give the folder of a diffusers model\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


def test_an_exported_model_that_was_changed_is_refused(tmp_path):
    """A flipped bit of the weights, or a number of a config, that reads well and means another model."""
    write_drawn_run(tmp_path / "run", TINY)
    convert("to-diffusers", tmp_path / "run", tmp_path / "model")
    weights, scheduler = tmp_path / "model/unet" / SAFETENSORS, tmp_path / "model/scheduler/scheduler_config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(UsageError, match="damaged or changed: it is not what ddpm_jax exported"):
        convert("from-diffusers", tmp_path / "model", tmp_path / "new")
    weights.write_bytes(content)
    scheduler.write_text(scheduler.read_text().replace("0.5", "0.4"))
    with pytest.raises(UsageError, match="damaged or changed: it is not what ddpm_jax exported"):
        convert("from-diffusers", tmp_path / "model", tmp_path / "new")
