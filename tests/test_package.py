"""The package as its users get it: one console command, configs by name, metadata, and a wheel that works when installed."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax
import pytest
import yaml

import ddpm_jax
from ddpm_jax.commands import arguments, cli
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data.sources import digits
from ddpm_jax.evaluation import scores

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAMES = [name.replace("_", "-") for name in cli.COMMANDS]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Calls the console command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    for name in ("install", "end"):  # the test process keeps its own signal handlers
        monkeypatch.setattr(f"ddpm_jax.commands.cli._Interrupts.{name}", lambda *_: None)
    monkeypatch.setattr("ddpm_jax.commands.cli._quiet", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ddpm-jax", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


# ---- The console command


def test_every_command_is_one_of_the_console(call):
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert scripts == set(cli.COMMANDS) - {"configs", "env"}
    assert set(cli.COMMANDS) == set(arguments.PARSERS)
    code, out, _ = call("--help")
    assert code == 0
    for name in NAMES:
        assert re.search(rf"^  {name} ", out, re.MULTILINE)
    assert call() == (2, out, "")


def test_its_version_is_the_packages(call):
    assert call("--version") == (0, f"ddpm-jax {ddpm_jax.__version__}\n", "")


def test_unknown_command_is_answered_with_the_nearest(call):
    assert call("trian") == (2, "", "ddpm-jax: trian is not a command; perhaps you meant train\n")
    code, out, err = call("xyz")
    assert (code, out) == (2, "")
    assert "prepare-data" in err


@pytest.mark.parametrize("name", NAMES)
def test_help_names_what_was_called(name, call):
    config = ["digits"] if name in ("train", "benchmark") else []
    code, out, err = call(name, *config, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: ddpm-jax {name}")
    assert f"{name.replace('-', '_')}.py" not in out


@pytest.mark.parametrize("name", ["sample", "evaluate", "prepare-data"])
def test_refusal_names_what_was_called(name, call):
    code, out, err = call(name)
    assert (code, out) == (2, "")
    assert f"ddpm-jax {name}" in err
    assert f"ddpm-jax {name} --help" in err


# ---- Configs and the environment


def test_configs_are_listed_with_a_line_each(call):
    code, out, err = call("configs")
    assert (code, err) == (0, "")
    *listed, last = out.splitlines()
    assert [line.split()[0] for line in listed] == CONFIGS
    for line in listed:
        name, text = line.split(maxsplit=1)
        assert text == (ROOT / "configs" / f"{name}.py").read_text().splitlines()[0].strip('"')
    assert str(ROOT / "configs") in last


def test_config_is_found_by_its_name_from_any_folder(call):
    code, out, err = call("train", "cifar10")
    assert (code, out) == (2, "")
    assert "no workdir was given" in err


def test_env_prints_what_a_bug_report_needs(call, monkeypatch):
    monkeypatch.setenv("JAX_SOMETHING", "of mine")
    monkeypatch.setenv("SOME_PASSWORD", "secret")
    code, out, err = call("env")
    assert (code, err) == (0, "")
    for fact in (
        ddpm_jax.__version__,
        sys.executable,
        f"jaxlib {jax.lib.__version__}",
        "8 cpu",
        "JAX_SOMETHING: of mine",
    ):
        assert fact in out
    for name in ("flax", "jax", "orbax-checkpoint", "scikit-learn"):
        assert f"{name} {importlib.metadata.version(name)}" in out
    assert "secret" not in out


def test_env_reports_an_installation_in_which_jax_does_not_start(call, monkeypatch):
    def fail():
        raise RuntimeError("the driver is too old\nand so on")

    monkeypatch.setattr(jax, "devices", fail)
    code, out, _ = call("env")
    assert code == 0
    assert "the driver is too old" in out.splitlines()[-1]
    assert f"jax {jax.__version__}" in out


# ---- What evaluation alone needs


def test_evaluations_packages_are_imported_by_evaluation_alone():
    for path in (ROOT / "ddpm_jax").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            needs = {name.split(".")[0] for name in names} & {"sklearn", "matplotlib"}
            assert not needs or path.name == "digits.py", path


def test_what_needs_an_extra_says_so(call, monkeypatch, tmp_path):
    for module in ("sklearn", "sklearn.datasets", "sklearn.metrics", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    extra = 'pip install "ddpm-jax[evaluation]"'
    code, out, err = call("train", "digits", "--workdir", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "data.source=digits needs sklearn" in err
    assert extra in err
    code, out, err = call("evaluate", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert extra in err
    with pytest.raises(UsageError, match=re.escape(extra)):
        digits("digits")
    with pytest.raises(UsageError, match=re.escape(extra)):
        scores.neighbourhoods(jax.numpy.eye(8), jax.numpy.eye(8))


# ---- Metadata


def test_the_wheel_is_told_every_package():
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "ddpm_jax").rglob("__init__.py")]
    packages = {".".join(folder.parts) for folder in folders} | {"ddpm_jax.configs", "ddpm_jax.results"}
    assert sorted(packages) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ddpm_jax.__version__
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"version = \{(.*?)\}", readme)[1] == ddpm_jax.__version__
    assert f"\n## {ddpm_jax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == PROJECT["project"]["license"] == "Apache-2.0"


def test_workflows_test_the_ends_of_what_the_package_takes():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    matrix = jobs["released"]["strategy"]["matrix"]["include"]
    pythons = [c.split(" :: ")[-1] for c in PROJECT["project"]["classifiers"] if "Python :: 3." in c]
    assert [job["python"] for job in matrix] == pythons
    (bound,) = [line for line in PROJECT["project"]["dependencies"] if line.startswith("jax>")]
    assert matrix[0]["jax"] == f"{bound.replace('>=', '==')}.0"
    assert {job["jax"] for job in matrix[1:]} == {bound}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = [word for command in commands if command.startswith("make ") for word in command.split()[1:]]
    assert {word for word in made if "/" not in word} <= targets
    assert {"check", "test", "demo"} <= set(made)


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    commands = re.search(r"```\n(.*?)```", text, re.DOTALL)[1].splitlines()
    assert len(commands) == 3
    assert commands[1:] == ["make check", "make test"]
    rows = re.findall(r"^\| .*? \| (.*?) \| (.*?) \|$", text, re.MULTILINE)[1:]
    for place, entry in rows:
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", place + entry):
            assert (ROOT / name).exists(), name
        if table := re.match(r"`([A-Z]+)`", entry):
            (path,) = re.findall(r"`([\w/]+\.py)`", entry) or re.findall(r"`([\w/]+\.py)`", place)
            assert re.search(rf"^{table[1]}\b.*=", (ROOT / path).read_text(), re.MULTILINE), entry


# ---- The wheel


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory):
    """The commands of an environment with the wheel, which borrows this one's other packages; no network is needed."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("ddpm_jax", "configs", "results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder / "dist", folder]
    subprocess.run(build, check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    borrowed = Path(jax.__file__).parent.parent
    (site / "borrowed.pth").write_text(f"{borrowed}\n")
    into = [
        *pip,
        "--python",
        folder / "env/bin/python",
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        wheel,
    ]
    subprocess.run(into, check=True)
    for name in ("ddpm_jax", "configs", "results"):
        shutil.rmtree(folder / name)
    return folder / "env/bin"


@pytest.mark.slow
def test_the_wheel_stays_small(bin_folder):
    """Results are shipped without their pictures, and in less than 6.5 MB."""
    (wheel,) = (bin_folder.parent.parent / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        results = [entry for entry in archive.infolist() if entry.filename.startswith("ddpm_jax/results/")]
    assert {Path(entry.filename).suffix for entry in results} == {".json", ".safetensors"}
    assert sum(entry.compress_size for entry in results) < 6.5e6


@pytest.mark.slow
def test_the_installed_wheel_trains_and_samples_digits_from_another_folder(bin_folder, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"DDPM_JAX_CACHE": str(tmp_path / "cache"), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, and quick to compile
    empty = tmp_path / "empty"
    empty.mkdir()

    def call(*command):
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import ddpm_jax, pathlib; print(*pathlib.Path(ddpm_jax.__file__).parent.iterdir(), sep='\\n')"
    files = [Path(line) for line in call(bin_folder / "python", "-c", code).split("\n") if line]
    assert all(path.is_relative_to(bin_folder.parent) for path in files)  # not the checkout
    assert {"py.typed", "configs"} <= {path.name for path in files}
    assert call(
        bin_folder / "python", "-c", "import importlib.metadata as m; print(m.version('ddpm-jax'))"
    ).strip() == (ddpm_jax.__version__)
    command = bin_folder / "ddpm-jax"
    assert [line.split()[0] for line in call(command, "configs").splitlines()[:-1]] == CONFIGS
    assert str(bin_folder.parent) in call(command, "env")
    small = ("--model.ch", "8", "--diffusion.T", "20", "--diffusion.beta-start", "0.01", "--diffusion.beta-end", "0.6")
    call(command, "train", "digits", "--workdir", "run", "--train.steps", "20", "--train.sample-every", "20", *small)
    call(command, "sample", "run", "--num-images", "8", "--out", "samples")
    assert len([*(empty / "samples").glob("*.png")]) == 8 + 1  # and the grid
    call(command, "sample", "pretrained:digits", "--num-images", "8", "--out", "pretrained")
    assert len([*(empty / "pretrained").glob("*.png")]) == 8 + 1
    assert sorted(path.name for path in empty.iterdir()) == ["pretrained", "run", "samples"]
    (licence,) = bin_folder.parent.glob("lib/python*/site-packages/ddpm_jax-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()
