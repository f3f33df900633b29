"""A run as a file for programs without this package: its parameters, and its sampler as a program of jax.export."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from interop import convert, drawn, write_drawn_run
from tiny import experiment, tiny

from ddpm_jax import config as configs
from ddpm_jax.core.sharding import make_mesh
from ddpm_jax.generation.generator import draw, make_generator, sample_key
from ddpm_jax.training.parameters import flatten

CONFIG = tiny(diffusion={"T": 8})
SEED, INDICES = 2**32 - 1, range(3, 6)

# Run by a Python that starts without site-packages: jax, what it installs, and what it reads the file with is all it finds.
INSTALLED = ("jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy", "flatbuffers")
PROGRAM = """
import sys
sys.path.append({site!r})
import jax, numpy
program = jax.export.deserialize(bytearray(open({file!r}, "rb").read()))
assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
images = program.call(jax.numpy.uint32({seed}), jax.numpy.arange({first}, {last}, dtype="int32"))
numpy.save({out!r}, images)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    write_drawn_run(workdir, CONFIG)
    return workdir


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_parameters_are_exported_by_our_names_with_the_config(weights, workdir, tmp_path):
    convert(
        "export", workdir, tmp_path / "new" / "model.safetensors", *([] if weights == "ema" else ["--weights", "raw"])
    )
    expected = flatten(drawn(CONFIG, seed=["raw", "ema"].index(weights)))
    with safetensors.safe_open(tmp_path / "new" / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(expected)
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in expected}
    assert configs.from_json(json.loads(metadata["config"])) == CONFIG
    assert (metadata["step"], metadata["weights"]) == ("0", weights)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


@pytest.mark.slow
def test_exported_sampler_gives_the_same_images_where_only_jax_and_flatbuffers_are_installed(workdir, tmp_path):
    convert("export", workdir, tmp_path / "sampler.jax_export")
    mesh = make_mesh(devices=jax.devices()[:1])
    params = jax.tree.map(jnp.asarray, drawn(CONFIG, seed=1))
    generator = make_generator(experiment(CONFIG), mesh)
    expected = draw(generator, params, sample_key(SEED), INDICES, size=3)
    site = tmp_path / "site"
    site.mkdir()
    for name in INSTALLED:
        package = Path(importlib.util.find_spec(name).origin).parent
        for folder in (package, package.with_name(f"{name}.libs")):  # some wheels keep shared libraries beside them
            if folder.exists():
                (site / folder.name).symlink_to(folder)
    program = PROGRAM.format(
        site=str(site),
        file=str(tmp_path / "sampler.jax_export"),
        out=str(tmp_path / "images.npy"),
        seed=SEED,
        first=INDICES.start,
        last=INDICES.stop,
    )
    (tmp_path / "program.py").write_text(program)
    # -I: no environment variables and not the current folder; -S: no site-packages.
    subprocess.run([sys.executable, "-I", "-S", tmp_path / "program.py"], check=True, cwd=tmp_path)
    images = np.load(tmp_path / "images.npy")
    assert images.dtype == np.uint8
    assert np.std(images) > 30
    assert abs(images.astype(int) - expected.astype(int)).max() <= 1
