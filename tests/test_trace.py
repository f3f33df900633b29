"""The summary of a profile: times against sums by hand, and a profile that is recorded here."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from ddpm_jax.benchmark import trace
from ddpm_jax.benchmark.trace import Event


def test_an_event_counts_without_those_inside_of_it():
    loop, body, later = Event("a", "while", 0, 100), Event("a", "dot", 10, 30), Event("a", "dot", 100, 7)
    inner, other = Event("a", "add", 12, 5), Event("b", "dot", 11, 50)
    own = {(e.name, e.start): time for e, time in trace.own_times([later, inner, body, other, loop])}
    assert own == {("while", 0): 70, ("dot", 10): 25, ("add", 12): 5, ("dot", 100): 7, ("dot", 11): 50}


def test_times_are_summed_by_kernel_and_by_part():
    origin = {
        "q": "jit(train_steps)/while/body/jvp(UNet)/mid_attn_1/q/dot_general",
        "conv": "jit(train_steps)/while/body/transpose(jvp(UNet))/down_0_block_0/conv1/conv_general_dilated",
        "adam": "jit(train_steps)/while/body/mul",
    }
    recorded = [
        Event("s", "gemm", 1e6, 2e6, "q"),
        Event("s", "fprop", 4e6, 6e6, "conv"),
        Event("s", "gemm", 10e6, 1e6, "q"),
        Event("s", "fused", 12e6, 1e6, "adam"),
        Event("s", "copy", 14e6, 6e6),
    ]
    told = trace.summarise(recorded, origin)
    assert (told["busy_ms"], told["span_ms"], told["events"]) == (16.0, 19.0, 5)
    assert told["kernels"][:3] == [
        {"name": "fprop", "count": 1, "ms": 6.0, "share": 6 / 16},
        {"name": "copy", "count": 1, "ms": 6.0, "share": 6 / 16},
        {"name": "gemm", "count": 2, "ms": 3.0, "share": 3 / 16},
    ]
    parts = {part["name"]: part["ms"] for part in told["parts"]}
    assert parts == {"convolutions, backward": 6, "unknown": 6, "attention": 3, "outside the network": 1}


def test_no_more_kernels_are_told_than_the_most():
    told = trace.summarise([Event("s", str(i), i, 1) for i in range(50)], {})
    assert len(told["kernels"]) == trace.MOST_KERNELS
    assert told["busy_ms"] == pytest.approx(50e-6)


def test_a_profile_without_work_is_empty():
    assert trace.summarise([], {})["kernels"] == []


def test_a_recorded_profile_names_the_programs_instructions_and_their_parts(tmp_path):
    """Also those of a loop's body, which run as often as it does."""

    def steps(x):
        def body(x, _):
            with jax.named_scope("UNet/mid_attn_1/q"):
                return jnp.sin(x @ x), None

        return jax.lax.scan(body, x, None, length=5)[0]

    x = jnp.ones((200, 200))
    compiled = jax.jit(steps).lower(x).compile()
    trace.record(lambda: jax.block_until_ready(compiled(x)), str(tmp_path / "traces"), "steps", compiled.as_text())
    told = json.loads((tmp_path / "traces" / "steps.json").read_text())
    assert 5 in [kernel["count"] for kernel in told["kernels"]]
    assert "attention" in [part["name"] for part in told["parts"]]
    assert told["busy_ms"] > 0
    profile = gzip.decompress((tmp_path / "traces" / "steps.xplane.pb.gz").read_bytes())
    assert len(list(trace.events(ProfileData.from_serialized_xspace(profile)))) == told["events"]
