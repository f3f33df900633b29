"""The one table of names: complete, one to one, and what others call the same arrays."""

import ast
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY, experiment, tiny

from ddpm_jax.config import Config
from ddpm_jax.core.errors import UsageError
from ddpm_jax.interop.names import parameters
from ddpm_jax.training.parameters import check_fit

# Some of the CIFAR-10 network's, each in three lines: in the authors' checkpoint, in diffusers, in its older versions.
ROWS = """
model/temb/dense0/W (128, 512)
time_embedding.linear_1.weight (512, 128)
time_embedding.linear_1.weight
model/conv_in/W (3, 3, 3, 128)
conv_in.weight (128, 3, 3, 3)
conv_in.weight
model/down_0/block_0/norm1/gamma (128,)
down_blocks.0.resnets.0.norm1.weight (128,)
down_blocks.0.resnets.0.norm1.weight
model/down_0/downsample/conv/W (3, 3, 128, 128)
down_blocks.0.downsamplers.0.conv.weight (128, 128, 3, 3)
down_blocks.0.downsamplers.0.conv.weight
model/down_1/block_0/temb_proj/W (512, 256)
down_blocks.1.resnets.0.time_emb_proj.weight (256, 512)
down_blocks.1.resnets.0.time_emb_proj.weight
model/down_1/block_0/nin_shortcut/W (128, 256)
down_blocks.1.resnets.0.conv_shortcut.weight (256, 128, 1, 1)
down_blocks.1.resnets.0.conv_shortcut.weight
model/down_1/attn_0/norm/beta (256,)
down_blocks.1.attentions.0.group_norm.bias (256,)
down_blocks.1.attentions.0.group_norm.bias
model/down_1/attn_1/q/W (256, 256)
down_blocks.1.attentions.1.to_q.weight (256, 256)
down_blocks.1.attentions.1.query.weight
model/mid/attn_1/proj_out/b (256,)
mid_block.attentions.0.to_out.0.bias (256,)
mid_block.attentions.0.proj_attn.bias
model/mid/block_2/norm2/beta (256,)
mid_block.resnets.1.norm2.bias (256,)
mid_block.resnets.1.norm2.bias
model/up_3/upsample/conv/b (256,)
up_blocks.0.upsamplers.0.conv.bias (256,)
up_blocks.0.upsamplers.0.conv.bias
model/up_1/attn_2/v/b (256,)
up_blocks.2.attentions.2.to_v.bias (256,)
up_blocks.2.attentions.2.value.bias
model/up_1/attn_2/k/W (256, 256)
up_blocks.2.attentions.2.to_k.weight (256, 256)
up_blocks.2.attentions.2.key.weight
model/norm_out/gamma (128,)
conv_norm_out.weight (128,)
conv_norm_out.weight
"""
CIFAR10 = parameters(experiment(Config()))


def row_of(p):
    return p.tensorflow, p.shape, p.diffusers, p.diffusers_shape, p.diffusers_old


def test_some_names_and_shapes_of_the_cifar10_network_are_those_of_the_others():
    lines = [line.partition(" ") for line in ROWS.split("\n") if line]
    rows = {row_of(p) for p in CIFAR10}
    for (tensorflow, _, shape), (name, _, their_shape), (old_name, _, _) in zip(*[iter(lines)] * 3, strict=True):
        assert (tensorflow, ast.literal_eval(shape), name, ast.literal_eval(their_shape), old_name) in rows


def test_every_name_of_the_cifar10_network_is_that_of_the_others():
    path = os.environ.get("DDPM_JAX_NAME_MAP")
    if not path:
        pytest.skip("DDPM_JAX_NAME_MAP is not set to a JSON file of all 328 names")
    rows = json.loads(Path(path).read_text())
    expected = [
        (r["tf"], tuple(r["tf_shape"]), r["diffusers"], tuple(r["diffusers_shape"]), r["diffusers_old"]) for r in rows
    ]
    assert sorted(map(row_of, CIFAR10)) == sorted(expected)


@pytest.mark.parametrize("config", [Config(), TINY, tiny(model={"ch_mult": (1, 2, 2), "num_res_blocks": 2})])
def test_names_are_one_to_one(config):
    table = parameters(experiment(config))
    for kind in ("path", "tensorflow", "diffusers", "diffusers_old"):
        assert len({getattr(p, kind) for p in table}) == len(table)


def test_the_table_holds_every_parameter_of_the_cifar10_network():
    assert len(CIFAR10) == 328
    assert sum(math.prod(p.shape) for p in CIFAR10) == 35_746_307


def test_arrays_come_back_from_the_layout_of_pytorch():
    rng = np.random.default_rng(0)
    for p in parameters(experiment(TINY)):
        array = rng.normal(size=p.shape)
        there = p.to_diffusers(array)
        assert there.shape == p.diffusers_shape
        np.testing.assert_array_equal(p.from_diffusers(there), array)


def test_missing_extra_and_misshapen_tensors_are_named():
    expected = {"a": (1,), "b": (2,), "c": (3,)}
    check_fit(expected, expected, "FILE")
    end = "; use the config that it was trained with, or a whole copy of the file"
    for found, message in [
        ({"a": (1,), "b": (2,)}, "c is missing"),
        (expected | {"d": (4,)}, "d is not of this network"),
        (expected | {"b": (5, 2)}, "b has shape (5, 2), expected (2,)"),
        ({"a": (2,), "d": ()}, "b is missing, c is missing, d is not of this network, and 1 more differ"),
    ]:
        with pytest.raises(UsageError) as refusal:
            check_fit(found, expected, "FILE")
        assert str(refusal.value) == f"FILE does not fit the network of its config: {message}{end}"
