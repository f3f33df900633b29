"""The Inception network and its preprocessing against torch-fidelity's and PyTorch's, with random weights; its weights' file."""

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fidelity import fidelity

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.evaluation import inception_weights
from ddpm_jax.evaluation.inception import InceptionV3, preprocess, resize_matrix
from ddpm_jax.evaluation.inception_weights import convert_inception, inception_features, load_inception

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def random_state(torch):
    """The network's state in torch-fidelity's names, drawn so that activations keep their size through all layers."""
    network = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        extractor = network("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in extractor.state_dict().items():
        draw = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            state[name] = draw.abs() + 0.5
        elif name.endswith("bn.weight"):
            state[name] = 1 + 0.2 * draw
        elif name.endswith("num_batches_tracked"):
            state[name] = value
        elif value.ndim == 4:
            state[name] = draw * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = 0.1 * draw
    extractor.load_state_dict(state)
    return extractor, state


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """torch-fidelity's network with random weights, their file, and the file converted from it."""
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    extractor, state = random_state(torch)
    folder = tmp_path_factory.mktemp("inception")
    source = folder / "weights.pth"
    torch.save(state, source)
    out = convert_inception(source, folder / "inception.safetensors", sha256=sha256(source)[:8])
    return extractor, source, out


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected))


# ---- The network


@pytest.fixture(scope="module")
def ours(converted):
    """Our features and logits for both preprocessings, on two devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    options = {"path": converted[2], "batch_size": 2}
    return {name: inception_features(mesh, preprocessing=name, **options) for name in ("tensorflow", "pytorch-fid")}


def test_features_and_logits_are_torch_fidelitys(converted, ours):
    torch = pytest.importorskip("torch")
    features, logits = converted[0](torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    computed = ours["tensorflow"].compute(IMAGES)
    assert computed["features"].shape == (2, 2048)
    assert computed["logits"].shape == (2, 1008)
    assert relative_error(computed["features"], features) < 1e-5
    assert relative_error(computed["logits"], logits) < 1e-5
    assert relative_error(features[0], features[1]) > 0.01  # features that tell images apart


def test_features_are_torch_fidelitys_with_pytorch_fids_preprocessing(converted, ours):
    """pytorch-fid has the same layers; its images are resized and scaled before them."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2) / 255.0).float()
    x = 2 * torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
    module = fidelity("feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:  # undo what the extractor does before its layers: (x - 128) / 128
        patch.setattr(module, "interpolate_bilinear_2d_like_tensorflow1x", lambda *args, **kwargs: x * 128 + 128)
        features, _ = converted[0](torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy()))
    computed = ours["pytorch-fid"].compute(IMAGES)["features"]
    assert relative_error(computed, features) < 1e-5
    assert relative_error(ours["tensorflow"].compute(IMAGES)["features"], features) > 1e-3  # they do differ


def test_the_names_tell_preprocessings_and_weights_apart(ours):
    assert ours["tensorflow"].name != ours["pytorch-fid"].name
    assert "tensorflow" in ours["tensorflow"].name


def test_a_batch_is_padded_to_the_devices_and_cut_again(ours):
    both = ours["tensorflow"].compute(IMAGES)["features"]
    alone = ours["tensorflow"].compute(IMAGES[1:])["features"]
    np.testing.assert_allclose(alone[0], both[1], rtol=1e-4, atol=1e-5)


# ---- Preprocessing


@pytest.mark.parametrize("size", [8, 32, 256, 299, 400])
def test_resizing_is_tensorflow_1s(size):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    resize = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    image = np.random.default_rng(size).integers(0, 256, (1, size, size, 1), np.uint8)
    expected = resize(torch.from_numpy(image.transpose(0, 3, 1, 2)).float(), size=(299, 299), align_corners=False)
    actual = np.asarray(preprocess(image, "tensorflow"))[..., 0]
    np.testing.assert_allclose(actual, (expected[:, 0] - 128) / 128, atol=1e-4)  # PyTorch's places are float32


@pytest.mark.parametrize("size", [8, 32, 256, 299, 400])
def test_resizing_is_pytorchs(size):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    image = np.random.default_rng(size).integers(0, 256, (1, size, size, 3), np.uint8)
    x = torch.from_numpy(image.transpose(0, 3, 1, 2) / 255.0).float()
    expected = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    actual = np.asarray(preprocess(image, "pytorch-fid")).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(actual, 2 * expected - 1, atol=1e-4)  # PyTorch's places are float32


@pytest.mark.parametrize("preprocessing", ["tensorflow", "pytorch-fid"])
def test_even_images_stay_even_and_grey_ones_have_three_channels(preprocessing):
    assert np.allclose(resize_matrix(10, preprocessing).sum(axis=1), 1)
    x = np.asarray(preprocess(np.full((1, 8, 8, 1), 255, np.uint8), preprocessing))
    assert x.shape == (1, 299, 299, 3)
    assert np.ptp(x) < 1e-5
    assert x.max() == pytest.approx(127 / 128 if preprocessing == "tensorflow" else 1.0, abs=1e-5)


# ---- The weights' file


def test_the_network_has_the_published_number_of_parameters():
    empty = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), empty)["params"]
    # torchvision's inception_v3 less its auxiliary head, its 1000-class layer and one of the two numbers that each of the
    # 17,216 normalised channels has; and 1008 outputs without bias.
    backbone = 27_161_264 - 3_326_696 - 2_049_000
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == backbone - 17_216 + 2048 * 1008


def test_weights_that_are_not_there_are_told_in_one_sentence(tmp_path):
    with pytest.raises(UsageError) as error:
        load_inception(tmp_path / "none.safetensors")
    message = str(error.value)
    assert "download pt_inception-2015-12-05-6726825d.pth" in message
    assert "nll, rate-distortion and nearest work" in message
    assert "\n" not in message


def test_another_file_than_the_public_one_is_refused(converted, tmp_path):
    with pytest.raises(UsageError, match=r"the SHA-256 of .* expected it to start with 6726825d"):
        convert_inception(converted[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_that_executes_is_refused_and_executes_nothing(tmp_path):
    pytest.importorskip("torch", reason="the parity extra is not installed")

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({"fc.weight": Malicious()}))
    with pytest.raises(UsageError, match="cannot be read as PyTorch weights"):
        convert_inception(path, tmp_path / "out", sha256=sha256(path))
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize("name", ["Mixed_7c.branch_pool.bn.running_var", "Conv2d_1a_3x3.conv.weight", "fc.weight"])
def test_a_missing_or_misshapen_tensor_is_named(converted, name):
    state = {key: tensor.numpy() for key, tensor in converted[0].state_dict().items()}
    assert inception_weights.fold(state).keys() == inception_weights._shapes().keys()
    for wrong in ({key: array for key, array in state.items() if key != name}, state | {name: state[name][:-1]}):
        with pytest.raises(UsageError, match="the Inception weights") as error:
            inception_weights.fold(wrong)
        assert name.split(".")[0] in str(error.value)


def test_converted_weights_that_changed_are_refused(converted, tmp_path):
    from safetensors.numpy import load_file, save_file

    path, content = tmp_path / "weights.safetensors", converted[2].read_bytes()
    path.write_bytes(content[:-4] + b"abcd")
    with pytest.raises(UsageError, match="their checksum differs"):
        load_inception(path)
    path.write_bytes(content[:1000])
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        load_inception(path)
    tensors = load_file(str(converted[2]))
    tensors["fc.kernel"] = tensors["fc.kernel"][:, :1000].copy()
    save_file(tensors, str(path))
    with pytest.raises(UsageError, match=r"fc.kernel is \(2048, 1000\), expected the shape \(2048, 1008\)"):
        load_inception(path)


def test_the_conversion_is_a_command(tmp_path):
    pytest.importorskip("torch", reason="reads the file: install the extra `parity`")
    command = [sys.executable, "convert.py", "inception", str(tmp_path / "none.pth")]
    process = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert process.returncode == 2
    assert "none.pth is not a file; download" in process.stderr
    assert "Traceback" not in process.stderr
