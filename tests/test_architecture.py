"""The house: wings whose imports go one way, functions of a readable size, no effect of importing the package."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "ddpm_jax"
# A module imports only from its own wing and from those before it. `config`, `__init__` (the package's list of names) and
# `__main__` are single files.
WINGS = [
    "core",
    "diffusion",
    "config",
    "models",
    "sampling",
    "data",
    "training",
    "generation",
    "evaluation",
    "interop",
    "benchmark",
    "commands",
    "__init__",
    "__main__",
]


def wing_of(module):
    return "__init__" if module == "ddpm_jax" else module.split(".")[1]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(["ddpm_jax", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        yield name, ast.parse(path.read_text()), path


def imports(tree):
    """The modules of the package that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ddpm_jax":
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if (ROOT.parent / (inside.replace(".", "/") + ".py")).exists() else node.module
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ddpm_jax")
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield from by_name(node.args[0])


def by_name(argument):
    """The module that import_module is given; of f"ddpm_jax.commands.{name}" the wing, of f"ddpm_jax.{name}" nothing."""
    parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
    if (
        isinstance(parts[0], ast.Constant)
        and parts[0].value.split(".")[0] == "ddpm_jax"
        and parts[0].value != "ddpm_jax."
    ):
        yield parts[0].value.rstrip(".")


def is_upward(importer, imported):
    return WINGS.index(wing_of(imported)) > WINGS.index(wing_of(importer))


def test_imports_go_one_way():
    upward = [(name, other) for name, tree, _ in modules() for other in imports(tree) if is_upward(name, other)]
    assert upward == []


def test_an_upward_import_would_be_found():
    assert is_upward("ddpm_jax.training.loop", "ddpm_jax.evaluation.metrics")
    assert is_upward("ddpm_jax.diffusion.process", "ddpm_jax.config")
    assert not is_upward("ddpm_jax.evaluation.evaluators", "ddpm_jax.training.loop")
    tree = ast.parse("def f():\n    from ddpm_jax.evaluation import metrics")
    assert list(imports(tree)) == ["ddpm_jax.evaluation.metrics"]
    assert is_upward("ddpm_jax.benchmark.worker", "ddpm_jax")
    tree = ast.parse("importlib.import_module('ddpm_jax.commands.cli')\nimport_module(f'ddpm_jax.commands.{name}')")
    assert list(imports(tree)) == ["ddpm_jax.commands.cli", "ddpm_jax.commands"]
    assert list(imports(ast.parse("importlib.import_module('ddpm_jax')"))) == ["ddpm_jax"]


def test_no_module_imports_itself_in_a_circle():
    graph = {name: set(imports(tree)) - {name, "ddpm_jax"} for name, tree, _ in modules()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(graph.get(name, ())):
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_few_files_lie_flat_in_the_root():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == ["__init__", "__main__", "config"]


def functions():
    for name, tree, _ in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{name}.{node.name}", node


def test_functions_are_of_a_readable_size():
    long = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert {name: lines for name, lines in long.items() if lines > 60} == {}


def test_functions_have_few_parameters():
    def count(node):
        return sum(a.arg not in ("self", "cls") for a in [*node.args.args, *node.args.kwonlyargs])

    assert {name: count(node) for name, node in functions() if count(node) > 7} == {}


def test_importing_has_no_effect_on_others():
    """No handler of Orbax is replaced, no log level set, no backend started."""
    code = """
import logging, jax, orbax.checkpoint as ocp
before = ocp.type_handlers.get_type_handler(jax.Array), logging.getLogger("absl").level, logging.getLogger().level
import ddpm_jax, ddpm_jax.commands.train, ddpm_jax.training.checkpoint
[getattr(ddpm_jax, n) for n in ddpm_jax.__all__]
after = ocp.type_handlers.get_type_handler(jax.Array), logging.getLogger("absl").level, logging.getLogger().level
assert before == after
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent, timeout=100)
