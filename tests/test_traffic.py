"""Bytes to and from HBM and expected cycles, read off a TPU program's text; what is expected is counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.benchmark import topology
from ddpm_jax.benchmark.cycles import Product, cycles, products
from ddpm_jax.benchmark.parts import part_of
from ddpm_jax.benchmark.traffic import hbm_bytes, instructions, traffic
from ddpm_jax.core import sharding

# One array is brought early, one in two slices; the loop's body works in VMEM but for one result.
# ruff: noqa: E501
HLO = """
HloModule jit_step, is_scheduled=true
%fused (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %neg.1 = f32[8,128]{1,0:T(8,128)} negate(%p)
}
%body (c: (f32[8,128], s32[])) -> (f32[8,128], s32[]) {
  %c = (f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:T(128)S(2)}) parameter(0)
  %x.1 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%c), index=0
  %i.1 = s32[]{:T(128)S(2)} get-tuple-element(%c), index=1
  %y.1 = f32[8,128]{1,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/jvp(UNet)/mid_block_1/norm1/mul" id=3}
  %z.1 = f32[8,128]{1,0:T(8,128)S(1)} copy(%y.1)
  ROOT %t = (f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:T(128)S(2)}) tuple(%z.1, %i.1)
}
ENTRY %main (a: bf16[3,100], b: f32[16,128]) -> f32[16,128] {
  %a = bf16[3,100]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[16,128]{1,0:T(8,128)} parameter(1)
  %early = (bf16[3,100]{1,0:T(8,128)(2,1)S(1)}, bf16[3,100]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%a)
  %s.1 = ((f32[16,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%b), slice={[0:8], [0:128]}
  %early-done = bf16[3,100]{1,0:T(8,128)(2,1)S(1)} copy-done(%early)
  %used.1 = bf16[3,100]{1,0:T(8,128)(2,1)S(1)} bitcast(%early-done)
  %s.2 = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s.1)
  %k = f32[8,128]{1,0:T(8,128)S(1)} fusion(%used.1, %s.2), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/transpose(jvp(UNet))/up_0_block_1/conv2/cond/branch_0_fun/transpose(jvp())/mul" id=1}
  %init = (f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:T(128)S(2)}) tuple(%k, %zero)
  %w = (f32[8,128]{1,0:T(8,128)S(1)}, s32[]{:T(128)S(2)}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[16,128]{1,0:T(8,128)} add(%b, %b), metadata={op_name="jit(f)/add" id=2}
}
"""


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("f32[7]", 28),
        ("bf16[]", 2),
        ("pred[3]{0}", 3),
        ("f32[5,3]{1,0:T(8,128)}", 8 * 128 * 4),
        ("f32[2,5,3]{0,1,2:T(8,128)}", 3 * 8 * 128 * 4),  # dimension 0 is the minor one
        ("bf16[16,256]{1,0:T(8,128)(2,1)}", 16 * 256 * 2),
        ("f32[300]{0:T(256)}", 512 * 4),
        ("f32[5,3]{1,0:T(8,128)S(1)}", 0),
        ("(f32[8,128]{1,0:T(8,128)}, f32[4]{0:S(2)}, u32[2])", 4096 + 8),
    ],
)
def test_an_array_takes_its_tiles_in_hbm_and_nothing_elsewhere(array, size):
    assert hbm_bytes(array) == size


def test_each_byte_is_counted_once_where_it_moves():
    moved = [(one.op, one.read, one.written) for one in instructions(HLO)]
    assert moved == [
        ("copy-start", 8 * 128 * 2, 0),  # 3 x 100 in its tile
        ("slice-start", 8 * 128 * 4, 0),  # half of b
        ("add", 16 * 128 * 4, 16 * 128 * 4),  # b once, although it is both operands
        ("fusion", 0, 8 * 128 * 4),
        ("copy", 8 * 128 * 4, 0),
    ]


def test_the_parts_are_named_by_the_layer_and_early_copies_by_their_first_use():
    assert traffic(HLO) == {
        "outside the network": 2 * 8192 + 4096,
        "convolutions, backward": 2048 + 4096,
        "normalisation": 4096,
    }
    assert list(traffic(HLO)) == ["outside the network", "convolutions, backward", "normalisation"]


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("jit(f)/UNet/down_1_attn_0/norm/mul", "attention"),
        ("jit(f)/UNet/down_1_block_0/norm1/mul", "normalisation"),
        ("jit(f)/UNet/norm_out/mul", "normalisation"),
        ("jit(f)/UNet/up_1_upsample/conv_general_dilated", "convolutions"),
        ("jit(f)/transpose(jvp(UNet))/up_1_block_2/nin_shortcut/dot_general", "1x1 and dense, backward"),
        ("jit(f)/UNet/up_1_block_2/add", "rest of the network"),
        ("jit(f)/threefry2x32", "outside the network"),
    ],
)
def test_an_instruction_belongs_to_a_part_of_the_network(place, part):
    assert part_of(place) == part


CYCLES = """
%conv (x: bf16[4,8,8,3], k: bf16[3,3,3,256]) -> bf16[4,8,8,256] {
  %x = bf16[4,8,8,3]{3,2,1,0} parameter(0)
  %k = bf16[3,3,3,256]{3,2,1,0} parameter(1)
  ROOT %y = bf16[4,8,8,256]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(f)/UNet/conv_in/conv"}
}
%gradient (x: bf16[4,8,8,3], g: bf16[4,8,8,256]) -> bf16[3,3,3,256] {
  %x = bf16[4,8,8,3]{3,2,1,0} parameter(0)
  %g = bf16[4,8,8,256]{3,2,1,0} parameter(1)
  ROOT %k = bf16[3,3,3,256]{3,2,1,0} convolution(%x, %g), window={size=8x8 pad=1_1x1_1}, dim_labels=f01b_i01o->01bf, metadata={op_name="jit(f)/transpose(jvp(UNet))/conv_in/conv"}
}
ENTRY %main (x: bf16[4,8,8,3], k: bf16[3,3,3,256], a: bf16[4,128,256], b: bf16[4,256,64]) -> bf16[3,3,3,256] {
  %x = bf16[4,8,8,3]{3,2,1,0} parameter(0)
  %k = bf16[3,3,3,256]{3,2,1,0} parameter(1)
  %a = bf16[4,128,256]{2,1,0} parameter(2)
  %b = bf16[4,256,64]{2,1,0} parameter(3)
  %y = bf16[4,8,8,256]{3,2,1,0} fusion(%x, %k), kind=kOutput, calls=%conv, metadata={op_name="jit(f)/UNet/conv_in/conv"}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %z = bf16[4,8,8,256]{3,2,1,0} fusion(%x, %k), kind=kOutput, calls=%conv, metadata={op_name="jit(f)/UNet/conv_in/conv"}, backend_config={"window_config":{"estimated_cycles":"20"}}
  %p = bf16[4,128,64]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf, metadata={op_name="jit(f)/UNet/mid_attn_1/dot_general"}, backend_config={"estimated_cycles":"7"}
  %free = bf16[4,128,64]{2,1,0} bitcast(%p)
  %add = bf16[4,128,64]{2,1,0} add(%free, %free), metadata={op_name="jit(f)/UNet/mid_attn_1/add"}, backend_config={"estimated_cycles":"2"}
  ROOT %g = bf16[3,3,3,256]{3,2,1,0} fusion(%x, %z), kind=kOutput, calls=%gradient, metadata={op_name="jit(f)/transpose(jvp(UNet))/conv_in/conv"}, backend_config={"estimated_cycles":"30"}
}
"""


def test_cycles_are_summed_by_part():
    assert cycles(CYCLES) == {"convolutions": 120, "convolutions, backward": 30, "attention": 9}
    assert cycles(HLO) == {}


def test_the_zeros_of_a_strided_gradient_are_no_work():
    line = CYCLES.replace("window={size=3x3 pad=1_1x1_1}", "window={size=3x3 pad=1_1x1_1 lhs_dilate=2x2}")
    assert products(line)[0].gflops == pytest.approx(products(CYCLES)[0].gflops / 4)


def test_products_that_are_alike_are_one_with_the_cycles_of_all():
    """A convolution and its kernel's gradient have the same FLOPs; a batched product takes each place of the window once."""
    flops = 2 * 4 * 8 * 8 * 256 * 3 * 9 / 1e9
    assert products(CYCLES) == [
        Product("convolutions: [4, 8, 8, 3] x [3, 3, 3, 256] -> [4, 8, 8, 256]", 2, 2 * flops, 120),
        Product(
            "convolutions, backward: [4, 8, 8, 3] x [4, 8, 8, 256] -> [3, 3, 3, 256]",
            1,
            pytest.approx(flops),
            30,
        ),
        Product("attention: [4, 128, 256] x [4, 256, 64] -> [4, 128, 64]", 1, 2 * 4 * 128 * 64 * 256 / 1e9, 7),
    ]


@pytest.mark.filterwarnings(
    "ignore:Error reading persistent compilation cache"
)  # nothing compiled for a TPU is read here
def test_a_program_compiled_for_a_tpu_reads_and_writes_what_it_must():
    pytest.importorskip("libtpu", reason="the TPU compiler: install the extra `tpu`")
    device = topology.describe_topology("v5e:2x2")[0]
    everywhere = sharding.replicated(sharding.make_mesh(devices=[device]))

    def f(x, first, second):
        y = jax.lax.conv_general_dilated(x, first, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(
            jax.nn.silu(y), second, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = [(64, 32, 32, 128), (3, 3, 128, 128), (3, 3, 128, 128)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere) for shape in shapes]
    compiled = jax.jit(f).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    # x, both kernels and the result; what is between the convolutions stays in VMEM.
    least = 2 * (2 * 64 * 32 * 32 * 128 + 2 * 9 * 128 * 128)
    assert least <= sum(traffic(compiled.as_text()).values()) <= 1.01 * least
    assert compiled.cost_analysis()["bytes accessed"] > 1.9 * least
    assert sum(one.gflops for one in products(compiled.as_text())) == pytest.approx(4 * 64 * 32 * 32 * 9 * 128**2 / 1e9)
    assert sum(cycles(compiled.as_text()).values()) > sum(one.cycles for one in products(compiled.as_text())) > 0


class Chip:
    device_kind, platform = "TPU v5 lite", "tpu"


def test_the_roofline_says_which_peak_bounds_and_what_the_compiler_expects():
    row = topology.roofline({"gflops": 197.0, "memory_mib": 8 * 1024}, HLO, Chip)
    assert row["arithmetic_ms"] == pytest.approx(1)
    assert row["traffic_gb"] == pytest.approx(30_720 / 1e9)
    assert row["memory_ms"] == pytest.approx(30_720 / 819e6)
    assert row["of_hbm"] == pytest.approx(0.5)
    assert row["bound_by"] == "arithmetic"
    assert "expected_ms" not in row
    assert topology.roofline({"gflops": 0.001}, HLO, Chip)["bound_by"] == "memory"
    told = topology.tell_parts(row | {"what": "train step", "devices": 8}, largest=1)
    assert told == "train step, 8 chips: outside the network: 0.00 GB; other: 0.00 GB"
    assert topology.tell_parts({"what": "train step"}) == ""
    expected = topology.roofline({"gflops": 0.1}, CYCLES, Chip)
    per_ms = 197e9 / 131_072  # cycles at which the matrix unit reaches its peak
    assert expected["expected_ms"] == pytest.approx(159 / per_ms)
    assert expected["expected_ms_by_part"]["attention"] == pytest.approx(9 / per_ms)
    [product] = [one for one in expected["products"] if one["what"].startswith("attention")]
    assert product["of_peak"] == pytest.approx(2 * 4 * 128 * 64 * 256 / 131_072 / 7)
    told = topology.tell_parts(
        {"what": "x", "devices": 1, "traffic_bytes": {"a": 9e9, "b": 1e9}, "expected_ms_by_part": {"b": 3.0}}
    )
    assert told == "x, 1 chips: b: 1.00 GB, 3.00 ms; a: 9.00 GB, 0.00 ms"
    assert topology.roofline({"gflops": 0.1}, CYCLES.replace('"7"', '"0"'), Chip)["products"][-1]["cycles"] > 0
    assert "convolutions: 0.00 GB, 0.00 ms" in topology.tell_parts(expected | {"what": "train step", "devices": 8})


class Refused:
    """A jitted function whose program needs more memory than the chip has, or fails otherwise."""

    def __init__(self, message):
        self.message = message

    def trace(self, *_):
        return self

    def lower(self, **_):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_does_not_fit_is_a_row_that_says_so():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.04G of 15.75G hbm. Exceeded"
    row = topology._compile(Refused(message), mesh)
    assert row["bound_by"] == "does not fit: Used 21.04G of 15.75G hbm"
    assert row["devices"] == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        topology._compile(Refused("INTERNAL: broken"), mesh)
