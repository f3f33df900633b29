"""Two processes of one run: each reads what its own devices need, and together they have the batches that one would have."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_folders import CONTENT, SORTED, make_folder

from ddpm_jax.data import batch_indices, pictures

pytestmark = pytest.mark.slow

CHILD = """
import sys
import jax
import numpy as np
sys.path.insert(0, "tests")
process, address, source, out = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(process))
from tiny import tiny
from ddpm_jax.core import sharding
from ddpm_jax.data import make_feed, open_source
mesh = sharding.make_mesh()
assert (mesh.devices.size, jax.process_count()) == (4, 2)
found = {}
for cache in ("device", "host", "none"):
    for workers in (1, 4):
        data = {"source": source, "channels": 3, "cache": cache, "workers": workers}
        config = tiny(data=data, train={"batch_size": 4}, seed=3)
        feed = make_feed(config, open_source(config.data), mesh)
        for step in (0, 2, 4):  # the second epoch begins within step 1
            batch, dataset = feed(step, 2)
            for shard in batch.addressable_shards:
                local = np.asarray(shard.data)
                if dataset is not None:
                    local = np.asarray(dataset.addressable_shards[0].data)[local]
                for i, image in enumerate(local.swapaxes(0, 1), shard.index[1].start):
                    found[f"{cache}_{workers}_{step}_{i}"] = image
np.savez(out, **found)
"""


def test_two_processes_have_the_batches_of_one_for_any_cache_and_number_of_workers(tmp_path):
    source = make_folder(tmp_path / "pictures")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "DDPM_JAX_CACHE": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    outs = [tmp_path / f"{process}.npz" for process in range(2)]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(process), address, source, outs[process]],
            cwd=Path(__file__).parent.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output
    expected = np.stack([pictures.decode(CONTENT[name], (8, 8), 3) for name in SORTED])
    expected = expected[batch_indices(3, 0, 6, 4, 7)]
    places = []
    for out in outs:
        with np.load(out) as found:
            for name, images in found.items():
                _, _, step, i = name.split("_")
                np.testing.assert_array_equal(images, expected[int(step) : int(step) + 2, int(i)], err_msg=name)
                places.append(name)
    assert len(places) == len(set(places)) == 3 * 2 * 3 * 4  # caches, workers, dispatches, images; none of them in both
