"""benchmark.py: its rows, FLOPs against a count by hand, the collectives of compiled programs. No test asserts a time."""

import dataclasses
import importlib.util
import io
import json
import shlex
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import drawn, run_script, write_drawn_run
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from tiny import experiment, tiny

from ddpm_jax.benchmark import capacity, plan, programs, timing, topology, torch_peer
from ddpm_jax.benchmark.options import dtypes_of
from ddpm_jax.benchmark.plan import Plan
from ddpm_jax.config import DataConfig
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.version import __version__
from ddpm_jax.data import pictures
from ddpm_jax.training.step import init_state

SMALL = tiny(
    model={"ch": 4, "ch_mult": (1,), "attn_resolutions": (8,), "groups": 2, "dropout": 0.0},
    train={"batch_size": 8, "steps_per_dispatch": 1},
)


def taps(n):
    """Places of a window of 3 that lie on the image, summed over the n pixels of a row."""
    return 3 * n - 2


def by_hand(ch, size, channels):
    """Multiplications and additions of a network of one level, one residual block and attention everywhere, for one image."""
    pixels, window = size**2, taps(size) ** 2

    def conv(c, d):
        return 2 * window * c * d

    def dense(c, d, rows=pixels):
        return 2 * rows * c * d

    def block(c):
        shortcut = dense(c, ch) if c != ch else 0
        return conv(c, ch) + conv(ch, ch) + dense(4 * ch, ch, rows=1) + shortcut

    attention = 4 * dense(ch, ch) + 2 * 2 * pixels**2 * ch
    time = dense(ch, 4 * ch, rows=1) + dense(4 * ch, 4 * ch, rows=1)
    down, middle, up = block(ch), 2 * block(ch), 2 * block(2 * ch)
    return time + conv(channels, ch) + down + middle + up + 4 * attention + conv(ch, channels)


def test_flops_agree_with_a_count_by_hand():
    config = tiny(model={"ch": 512, "ch_mult": (1,), "attn_resolutions": (8,)})
    expected = 3 * by_hand(512, 8, 1)
    assert programs.network_flops(experiment(config), 3) == pytest.approx(expected, rel=0.01)


def test_a_training_step_is_three_evaluations_whatever_is_computed_twice():
    """The gradient of a product is two products. Neither rematerialisation nor the parts of a batch count."""
    model = {"ch": 256, "ch_mult": (1,), "attn_resolutions": (8,), "remat": True}
    config = tiny(model=model, train={"batch_size": 256, "accumulation": 4})
    evaluation = programs.network_flops(experiment(config), 256)
    assert programs.step_flops(experiment(config)) == pytest.approx(3 * evaluation, rel=0.01)


HLO = """
HloModule jit_step
%body (p: (f32[3,3]{1,0})) -> f32[3,3] {
  %all-reduce.1 = (f32[3,3]{1,0:T(8,128)S(1)}, bf16[5]{0}, f32[]{:T(128)}) all-reduce(%a, %b, %c), channel_id=1, to_apply=%add
  %fusion.2 = f32[7]{0} fusion(%all-reduce.1), kind=kLoop, calls=%fused
  %gte = f32[3,3]{1,0} get-tuple-element(%all-reduce.1), index=0
}
ENTRY %main {
  %all-reduce-start.4 = f32[1000]{0} all-reduce-start(%d), channel_id=2
  %all-reduce-done.4 = f32[1000]{0} all-reduce-done(%all-reduce-start.4)
  %all-gather-start.1 = (u8[2,4]{1,0}, u8[16,4]{1,0}) all-gather-start(%e), dimensions={0}
  %all-gather-done.1 = u8[16,4]{1,0} all-gather-done(%all-gather-start.1)
  %collective-permute-start = (s32[6]{0}, s32[6]{0}, u32[], u32[]) collective-permute-start(%f)
  ROOT reduce-scatter.9 = pred[8]{0} reduce-scatter(%g), dimensions={0}
}
"""


def test_collectives_of_a_text():
    assert topology.collectives(HLO) == [
        ("all-reduce", 36 + 10 + 4, 3),
        ("all-reduce", 4000, 1),
        ("all-gather", 64, 1),
        ("collective-permute", 24, 1),
        ("reduce-scatter", 8, 1),
    ]
    assert topology.tell(topology.collectives(HLO)[:2]) == "2 all-reduce of 4,050 B"
    assert topology.tell([]) == "none"


def test_collectives_of_a_program_compiled_for_two_devices():
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    x = jax.ShapeDtypeStruct((6, 5), jnp.float32, sharding=sharding.split(mesh))
    total = jax.jit(lambda x: x.sum(axis=0), out_shardings=sharding.replicated(mesh)).lower(x).compile()
    assert topology.collectives(total.as_text()) == [("all-reduce", 20, 1)]
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(x).compile()
    assert topology.collectives(whole.as_text()) == [("all-gather", 120, 1)]


def test_calls_take_turns_and_the_first_round_is_apart():
    order = []
    a, b = timing.take_turns([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == list("abababab")
    assert len(a.repeats) == len(b.repeats) == 3
    assert timing.Timing(9.0, [2.0, 1.0, 4.0]).median == 2.0
    assert timing.Timing(9.0, [2.0, 1.0, 4.0]).spread == 1.5


@pytest.mark.slow
def test_rows_of_samplers_train_step_and_data(tmp_path):
    config = SMALL
    wanted = Plan(samplers=("heun",), steps=(2,), batch_sizes=(2,), repeats=2, train=True, data=True, peak_tflops=1e-3)
    plan.refuse(config, wanted)
    rows = list(
        plan.measure(
            config,
            wanted,
            lambda: jax.jit(lambda: init_state(experiment(config), jax.random.key(0)).params)(),
        )
    )
    assert [row["what"] for row in rows] == ["heun", "train step", "data feed", "NumPy gather"]
    sampler, train, feed, gather = rows
    assert sampler["steps"] == 3  # network evaluations: Heun's method takes two a step, one in the last
    assert [row["devices"] for row in (sampler, train)] == [2, 8]
    assert not any("host_mib" in row for row in (sampler, train, gather))
    for row in rows:
        assert len(row["repeats_s"]) == 2
        assert row["median_s"] == np.median(row["repeats_s"])
    for row, images, times in ((sampler, 2, 3), (train, 8, 1), (feed, 512, 64), (gather, 512, 64)):
        assert row["images_per_s"] == images / row["median_s"]
        assert row["ms_each"] == 1000 * row["median_s"] / times
    assert sampler["flops"] == 3 * programs.network_flops(experiment(config), 2)
    assert train["flops"] == programs.step_flops(experiment(config))
    for row in (sampler, train):
        assert row["compile_s"] > 0
        assert row["peak_share"] == pytest.approx(row["flops"] / row["median_s"] / (row["devices"] * 1e9))
    params = 4 * sum(a.size for a in jax.tree.leaves(params_of(config)))
    assert sampler["memory_bytes"]["arguments"] >= params
    assert train["memory_bytes"]["shared"] >= 4 * params  # the state is donated: parameters, EMA and both moments

    lines = timing.table(rows, programs.COLUMNS).splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[0].split()[:4] == ["what", "steps", "batch", "dtype"]
    assert "peer" not in lines[0]  # no row has it

    plan.write_json(str(tmp_path / "out" / "rows.json"), config, rows, timing.environment())
    told = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert told["rows"] == rows
    assert told["config"]["model"]["ch"] == 4
    assert told["environment"]["versions"]["jax"] == jax.__version__
    assert told["environment"]["versions"]["ddpm-jax"] == __version__
    assert told["environment"]["devices"] == 8


def test_pictures_decoded_at_every_step_are_measured_beside_pillow_alone(tmp_path):
    """The very same pictures: the run's batches, in as many threads."""
    for i in range(3):
        Image.new("RGB", (9 + i, 8), (i, 0, 0)).save(tmp_path / f"{i}.jpg")
    config = tiny(data={"source": str(tmp_path), "channels": 3, "cache": "none", "workers": 2}, train={"batch_size": 8})
    feed, alone = programs.data(config, repeats=2, num_batches=4)
    assert [row["what"] for row in (feed, alone)] == ["data feed", "Pillow alone"]
    for row in (feed, alone):
        assert row["images_per_s"] == 4 * 8 / row["median_s"]
    assert ("host_mib" in feed) == (timing.host_memory() is not None)


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_alone_reads_every_picture_in_that_many_threads(channels):
    buffer, read, met = io.BytesIO(), [], threading.Barrier(2)
    Image.new("RGB", (9, 8)).save(buffer, "JPEG")

    def content(i):
        met.wait(timeout=10)  # for the other thread
        read.append(i)
        return buffer.getvalue()

    encoded = pictures.Pictures(range(6), content, lambda: None, {}, "")
    images = pictures.DecodedPictures(encoded, DataConfig(image_size=4, channels=channels, workers=1))
    programs.pillow_alone(images, [5, 1, 1, 0], 2)
    assert sorted(read) == [0, 1, 1, 5]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell it")
def test_memory_of_the_host_is_what_the_process_holds_without_the_files_it_maps(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(2**26, np.uint8))
    before = timing.host_memory()
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert mapped.sum() == 2**26  # every page is in memory
    assert abs(timing.host_memory() - before) < 2**24
    held = np.ones(2**26, np.uint8)
    assert 2**25 < timing.host_memory() - before < 2**27
    del held


def params_of(config):
    return jax.eval_shape(lambda: init_state(experiment(config), jax.random.key(0)).params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samplers": ("euler",)}, "got sampler 'euler', expected one of ancestral, ddim"),
        ({"steps": (0,)}, "--steps 0 is too small; use 1 or more"),
        ({"batch_sizes": (4, -1)}, "--batch-sizes -1 is too small"),
        ({"repeats": 0}, "--repeats 0 is too small"),
        ({"batch_sizes": ()}, "--steps or --batch-sizes has no value"),
        ({"samplers": ()}, "there is nothing to measure"),
        ({"peak_tflops": -1.0}, "--peak-tflops -1.0 is not a positive number"),
        ({"peak_tflops": float("nan")}, "--peak-tflops nan is not a positive number"),
        ({"repeats": 10**9}, "--repeats 1000000000 is too large; use 10000 or less"),
        ({"batch_sizes": (4, 10**9)}, "--batch-sizes 1000000000 is too large; use 1000000 or less"),
        ({"samplers": ("heun",), "steps": (5,), "peer": "torch"}, "no counterpart of sampler heun"),
        ({"fit": (16, 0)}, "--fit 0 is too small; use 1 or more"),
        ({"peer_mode": "default"}, "--peer-mode default has no effect without --peer torch"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        plan.refuse(SMALL, Plan(**changes))


def test_the_network_computes_as_the_config_says_unless_the_plan_does():
    bfloat16 = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, dtype="bfloat16"))
    assert dtypes_of(bfloat16, Plan()) == ("bfloat16",)
    assert dtypes_of(bfloat16, Plan(dtypes=("float32", "bfloat16"))) == ("float32", "bfloat16")


def test_a_batch_that_memory_cannot_hold_is_refused_with_the_bytes(monkeypatch):
    monkeypatch.setattr("ddpm_jax.core.room.free_memory", lambda: 2**20)
    with pytest.raises(UsageError, match=r"--batch-sizes 1000 needs at least \d+ MiB of memory, and 1 MiB are free"):
        plan.refuse(SMALL, Plan(steps=(5,), batch_sizes=(1000,)))
    plan.refuse(SMALL, Plan(steps=(5,), batch_sizes=(1,)))


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"data": True}, "--data"),
        ({"peer": "torch"}, "--peer"),
        ({"repeats": 3}, "--repeats"),
        ({"fit": (16,)}, "--fit"),
        ({"trace": "there"}, "--trace"),
    ],
)
def test_what_asks_for_running_is_refused_where_one_only_compiles(changes, option):
    with pytest.raises(UsageError, match=f"{option} has no meaning for --compile-for, which runs nothing"):
        plan.refuse(SMALL, Plan(**changes), compiling=True)


def test_fsdp_is_checked_by_the_devices_that_are_compiled_for(monkeypatch):
    """By the 16 of the topology, and not by the 8 that are there; samplers split no state."""
    monkeypatch.setattr(topology, "describe_topology", lambda name: jax.devices() * 2)
    monkeypatch.setattr(topology, "compile_sampling", lambda *_: {})
    split = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, fsdp=16))
    plan.refuse(split, Plan(train=True, steps=(5,)), compiling=True)
    plan.refuse(split, Plan(steps=(5,)))
    with pytest.raises(UsageError, match=r"train\.fsdp=16 does not divide the 8 devices"):
        plan.refuse(split, Plan(train=True, steps=(5,)))
    three = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, fsdp=3))
    with pytest.raises(UsageError, match=r"train\.fsdp=3 does not divide the 16 devices"):
        next(plan.compile_for(three, Plan(train=True, steps=(5,), batch_sizes=(16,)), "v5e:4x4"))


def test_batches_that_the_chips_do_not_share_are_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(topology, "describe_topology", lambda name: jax.devices())
    monkeypatch.setattr(topology, "_compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UsageError, match="--batch-sizes 1 is not divisible by the 8 chips; use 8"):
        plan.compile_for(SMALL, Plan(train=True), "v5e:2x4")


@pytest.fixture
def workdir(tmp_path):
    """A run of the small network."""
    write_drawn_run(tmp_path / "run", SMALL)
    return tmp_path / "run"


@pytest.fixture
def benchmark(monkeypatch, workdir):
    """Runs benchmark.py on the run, in this process, whose settings of JAX stay as they are."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return lambda *arguments: run_script("benchmark", workdir, *arguments)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(benchmark, workdir, monkeypatch):
    monkeypatch.setattr(programs, "sampling", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UsageError, match=r"rows.json cannot be written"):
        benchmark("--samplers", "ddim", "--steps", 5, "--json", workdir / "config.json" / "rows.json")


def test_rows_before_one_that_fails_are_told_and_written(benchmark, workdir, monkeypatch, capsys):
    def sampling(config, params, options, batch, **_):
        if batch == 16:
            raise MemoryError
        return [{"what": options.sampler, "batch": batch, "median_s": 0.25}]

    monkeypatch.setattr(programs, "sampling", sampling)
    with pytest.raises(MemoryError):
        benchmark("--samplers", "ddim", "--steps", 5, "--batch-sizes", 1, 16, "--json", workdir / "rows.json")
    rows = [{"what": "ddim", "batch": 1, "median_s": 0.25}]
    written = json.loads((workdir / "rows.json").read_text())
    assert written["rows"] == rows
    assert shlex.split(written["command"])[1:6] == [str(workdir), "--samplers", "ddim", "--steps", "5"]
    told = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told[:2]] == [["what", "batch", "median", "s"], ["ddim", "1", "0.2500"]]
    assert any(line.startswith("versions: ") for line in told)


def test_a_workdir_in_the_place_of_a_config_is_measured_with_its_parameters(benchmark, monkeypatch):
    seen = []
    monkeypatch.setattr(programs, "sampling", lambda config, params, *_, **__: seen.append((config, params)) or [])
    benchmark("--samplers", "ddim", "--steps", 5, "--batch-sizes", 1, "--dtypes", "bfloat16")
    [(measured, params)] = seen
    assert measured.config == dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, dtype="bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, params, drawn(SMALL, seed=1))  # the EMA


def test_a_peer_runs_in_turn_and_has_a_row_and_the_ratio():
    order, labels = [], {"what": "ddim", "steps": 5, "batch": 2, "dtype": "float32", "compile_s": 1.0}
    calls = [lambda name=name: order.append(name) for name in ("ours", "theirs")]
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    ours, theirs = programs._measure(labels, *calls, mesh, programs.How(3, peak=2.0), times=5, images=2, flops=1e6)
    assert order == ["ours", "theirs"] * 4
    assert ours["ratio_to_peer"] == ours["median_s"] / theirs["median_s"]
    assert {n: theirs[n] for n in ("what", "steps", "batch", "dtype", "devices")} == {
        "what": "ddim, torch",
        "steps": 5,
        "batch": 2,
        "dtype": "float32",
        "devices": 1,
    }
    assert "compile_s" not in theirs
    for row in (ours, theirs):
        assert row["peak_share"] == pytest.approx(1e6 / row["median_s"] / (row["devices"] * 2e12))


@pytest.mark.parametrize("option", [("--model.ch", 8), ("--diffusion.variance", "learned_range")])
def test_a_run_is_measured_as_it_is(option, benchmark):
    with pytest.raises(UsageError, match="whose network, images and process are fixed; leave out --model, --data and"):
        benchmark(*option)


def test_a_known_device_has_its_peak_and_float32_half_of_it_on_gpus():
    h100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
    v5e = SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")
    assert [timing.peak_tflops(h100, dtype) for dtype in ("bfloat16", "float32")] == [989.0, 494.5]
    assert [timing.peak_tflops(v5e, dtype) for dtype in ("bfloat16", "float32")] == [197.0, 197.0]
    assert timing.peak_tflops(jax.devices()[0], "float32") is None
    for kind, other in (("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")):
        assert timing.PEAK_TFLOPS[kind] == timing.PEAK_TFLOPS[other]  # one chip, by both of JAX's names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_peer_has_the_same_number_of_parameters_and_runs():
    pytest.importorskip("diffusers", reason="the peer: install the extra `parity`")
    peer = torch_peer.build_network(experiment(SMALL))
    ours = sum(a.size for a in jax.tree.leaves(params_of(SMALL)))
    assert sum(p.numel() for p in peer.parameters()) == ours
    assert torch_peer.sampling(experiment(SMALL), "ddim", 2, 3)().shape == (3, 1, 8, 8)
    torch_peer.training(experiment(SMALL))()


def test_on_a_gpu_the_peer_is_compiled_in_its_mode_and_on_cpu_not_at_all(monkeypatch):
    """CUDA's graphs, which max-autotune makes, may overwrite what the call before has returned: it is told so first."""
    order = []

    def compile(network, *, mode):
        order.append(mode)
        return lambda *arguments: order.append("call") or network(*arguments)

    steps = SimpleNamespace(cudagraph_mark_step_begin=lambda: order.append("step"))
    monkeypatch.setattr(torch_peer, "libraries", lambda: (SimpleNamespace(compile=compile, compiler=steps), None))
    assert torch_peer.compiled(abs, "max-autotune") is abs
    monkeypatch.setattr(torch_peer, "_device", lambda: "cuda")
    assert torch_peer.compiled(abs, "max-autotune")(-3) == 3
    assert order == ["max-autotune", "step", "call"]


def test_the_peer_is_compiled_as_the_plan_says(benchmark, monkeypatch):
    modes = []
    monkeypatch.setattr(torch_peer, "libraries", lambda: None)
    monkeypatch.setattr(torch_peer, "training", lambda _, *, mode: modes.append(mode))
    monkeypatch.setattr(programs, "training", lambda *_, **__: [])
    benchmark("--samplers", "--train", "--peer", "torch")
    benchmark("--samplers", "--train", "--peer", "torch", "--peer-mode", "default")
    assert modes == ["max-autotune", "default"]


# ---- The largest batch


@pytest.mark.parametrize("start", [8, 64, 1000])
@pytest.mark.parametrize(
    "needed",
    [
        lambda batch: 100 + 3 * batch,
        lambda batch: 100 + 3 * batch + 0.001 * batch**2,
        lambda batch: 100 + 2 * batch + 2 * max(0, batch - 300),
    ],
)
@pytest.mark.parametrize("limit", [130, 1000, 5000])
def test_the_largest_batch_is_found_with_few_questions(needed, limit, start):
    asked = []
    found = capacity.largest(lambda b: asked.append(b) or needed(b), limit, multiple=8, start=start)
    assert found % 8 == 0
    assert needed(found) <= limit
    assert needed(1.1 * found + 8) > limit
    assert len(set(asked)) == len(asked) <= 2 + capacity.MOST_TRIES


def test_where_no_batch_fits_none_is_told():
    assert capacity.largest(lambda batch: 100 + batch, 50, multiple=8, start=64) == 0


@pytest.mark.slow
def test_the_largest_batches_are_those_of_programs_that_fit():
    rows = list(capacity.largest_batches(experiment(SMALL), (1, 2)))
    assert [row["device_gib"] for row in rows] == [1, 2]
    for row in rows:
        assert 0.9 * capacity.USABLE < row["memory_mib"] / (row["device_gib"] * 1024) <= capacity.USABLE
    assert rows[1]["batch"] == pytest.approx(2 * rows[0]["batch"], rel=0.1)


def test_without_libtpu_compiling_for_tpus_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs libtpu, the TPU compiler; install it"):
        topology.describe_topology("v5e:2x4")


def test_what_libtpu_refuses_without_a_word_is_told_by_its_kind(monkeypatch):
    def refuse(**_):
        raise RuntimeError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topology.topologies, "get_topology_desc", refuse)
    with pytest.raises(UsageError, match="--compile-for v9 cannot be compiled for; libtpu says: RuntimeError; give"):
        topology.describe_topology("v9")


@pytest.mark.filterwarnings(
    "ignore:Error reading persistent compilation cache"
)  # nothing compiled for a TPU is read here
def test_compiling_for_a_tpu_topology():
    pytest.importorskip("libtpu", reason="the TPU compiler: install the extra `tpu`")
    rows = list(plan.compile_for(SMALL, Plan(samplers=("ddim",), steps=(3,), batch_sizes=(8,), train=True), "v5e:2x4"))
    assert [(row["what"], row["devices"]) for row in rows] == [("train step", 8), ("ddim", 8)]
    reduced = sum(c["bytes"] for c in rows[0]["each_collective"] if c["kind"] == "all-reduce")
    # Less than the gradients where two of them are one array: a bias added to what another bias is added to.
    assert 0.99 * rows[0]["gradient_bytes"] <= reduced <= rows[0]["gradient_bytes"] + 64
    assert rows[0]["memory_mib"] > 0
    assert not [c for c in rows[1]["each_collective"] if c["kind"] == "all-reduce"]
