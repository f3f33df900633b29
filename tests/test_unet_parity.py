"""The same network in another library: outputs and gradients against diffusers' UNet2DModel, which runs in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_unet import by_path, drawn_params, jit

from ddpm_jax.models.unet import UNet

SMALL = UNet(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), out_channels=2)
MANY_GROUPS = UNet(ch=24, ch_mult=(1, 3), num_res_blocks=2, attn_resolutions=(12, 6), groups=8, out_channels=6)
CASES = {  # network, image size, channels of the images, batch
    "small": (SMALL, 16, 1, 3),
    "attention_everywhere": (MANY_GROUPS, 12, 3, 2),
    "cifar10": pytest.param(UNet(), 32, 3, 2, marks=pytest.mark.slow),
}


@pytest.fixture(scope="module")
def libraries():
    """(torch, diffusers). Whatever their imports warn of is not ours to fix."""
    reason = "an independent implementation to compare with: install the extra `parity`"
    return pytest.importorskip("torch", reason=reason), pytest.importorskip("diffusers", reason=reason)


def peer_of(net, size, channels, diffusers):
    attends = [size // 2**i in net.attn_resolutions for i in range(len(net.ch_mult))]
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=net.out_channels,
        block_out_channels=[net.ch * mult for mult in net.ch_mult],
        layers_per_block=net.num_res_blocks,
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]],
        norm_num_groups=net.groups,
        norm_eps=1e-6,
        attention_head_dim=None,  # one head
        downsample_padding=0,  # bottom and right only
        flip_sin_to_cos=False,
        freq_shift=1,
        num_class_embeds=net.num_labels or None,
    )


def peer_name(path, levels):
    """down_1_block_0/temb_proj/kernel -> down_blocks.1.resnets.0.time_emb_proj.weight"""
    *layers, kind = path.split("/")
    name = ".".join(layers)
    for pattern, replacement in [
        (r"^temb_dense(\d)", lambda m: f"time_embedding.linear_{int(m[1]) + 1}"),
        (r"^norm_out", "conv_norm_out"),
        (r"^mid_(block|attn)_(\d)", lambda m: f"mid_{m[1]}_{int(m[2]) - 1}"),
        (r"^mid_", "mid_block."),
        (r"^up_(\d)_", lambda m: f"up_blocks.{levels - 1 - int(m[1])}."),  # they count the levels in order of use
        (r"^down_(\d)_", r"down_blocks.\1."),
        (r"(up|down)sample$", r"\1samplers.0.conv"),
        (r"\.block_", ".resnets."),
        (r"\.attn_", ".attentions."),
        (r"attentions\.(\d)\.norm", r"attentions.\1.group_norm"),
        (r"attentions\.(\d)\.([qkv])$", r"attentions.\1.to_\2"),
        (r"proj_out", "to_out.0"),
        (r"temb_proj", "time_emb_proj"),
        (r"nin_shortcut", "conv_shortcut"),
    ]:
        name = re.sub(pattern, replacement, name)
    return f"{name}.{'bias' if kind == 'bias' else 'weight'}"


def peer_array(path, leaf):
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)  # H W I O -> O I H W
    if "nin_shortcut/kernel" in path:
        return leaf.T[:, :, None, None]
    return leaf.T


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("net", "size", "channels", "batch"), CASES.values(), ids=CASES.keys())
def test_output_and_gradients_match_diffusers(net, size, channels, batch, libraries):
    torch, diffusers = libraries
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, size, size, channels)).astype(np.float32)
    target = rng.normal(size=(batch, size, size, net.out_channels)).astype(np.float32)
    t = rng.integers(0, 1000, batch).astype(np.int32)

    params = drawn_params(net, x, t)

    def loss(params):
        output = net.apply({"params": params}, x, t)
        return jnp.mean((output - target) ** 2), output

    grads, output = jax.device_get(jit(jax.grad(loss, has_aux=True))(params))

    peer = peer_of(net, size, channels, diffusers).double().eval()
    names = {path: peer_name(path, len(net.ch_mult)) for path in by_path(params)}
    weights = {
        names[path]: torch.tensor(peer_array(path, leaf), dtype=torch.float64) for path, leaf in by_path(params).items()
    }
    peer.load_state_dict(weights, strict=True)  # refuses a missing, an extra and a misshapen tensor
    peer_output = peer(torch.tensor(x.transpose(0, 3, 1, 2)).double(), torch.tensor(t)).sample.permute(0, 2, 3, 1)
    torch.mean((peer_output - torch.tensor(target)) ** 2).backward()

    np.testing.assert_allclose(output, peer_output.detach().numpy(), rtol=0, atol=5e-5)
    peer_grads = {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()}
    for path, grad in by_path(grads).items():
        expected = peer_grads[names[path]]
        atol = 1e-4 * abs(expected).max() + 1e-6
        np.testing.assert_allclose(peer_array(path, grad), expected, rtol=0, atol=atol, err_msg=path)
