"""Every exported name and every `make_*` says what it takes, gives and raises, with an example that runs."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ddpm_jax


def makers():
    for module in pkgutil.walk_packages(ddpm_jax.__path__, "ddpm_jax."):
        loaded = importlib.import_module(module.name)
        for name, value in vars(loaded).items():
            if name.startswith("make_") and inspect.isfunction(value) and value.__module__ == module.name:
                yield f"{module.name}.{name}", value


EXPORTED = {name: getattr(ddpm_jax, name) for name in ddpm_jax.__all__}
DOCUMENTED = EXPORTED | dict(makers())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_it_says_what_it_takes_and_gives(name):
    text = inspect.getdoc(DOCUMENTED[name])
    assert text
    if inspect.isclass(DOCUMENTED[name]):
        return
    parameters = [p for p in inspect.signature(DOCUMENTED[name]).parameters.values() if p.name != "self"]
    assert "Returns:" in text
    for parameter in parameters:
        assert f"{parameter.name}: " in text.split("Args:")[1], parameter.name


@pytest.mark.parametrize("name", EXPORTED)
def test_its_example_runs(name):
    tests = doctest.DocTestFinder(recurse=False).find(EXPORTED[name], name, globs={})
    examples = [test for test in tests if test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
