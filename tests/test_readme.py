"""The README's sentences about behaviour are true, and its code runs."""

import re
import shlex
from pathlib import Path

import pytest
from test_architecture import WINGS

import ddpm_jax
from ddpm_jax.commands.arguments import PARSERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")])
# In the places of arguments that a reader chooses.
PLACEHOLDERS = {"--help", "FOLDER", "PICTURES", "PHOTOS", "photos", "CONFIG", "S"}


def test_the_twelve_lines_run(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.strip().splitlines()) == 12
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (4, 8, 8, 1)
    assert 0.5 < float(names["loss"]) < 2.0  # an untrained network puts out nearly 0, so this is the noise's power
    assert "(4, 8, 8, 1)" in capsys.readouterr().out


def test_the_two_commands_come_first():
    first = re.search(r"```\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)


def test_every_public_name_is_there_and_documented():
    promised = """make_schedule Schedule q_sample q_posterior predict_x_0 p_mean_logvar simple_loss bits_per_dim UNet sample
    TrainState init_state make_train_step Config load_run"""
    assert set(promised.split()) <= set(ddpm_jax.__all__)
    for name in ddpm_jax.__all__:
        assert getattr(ddpm_jax, name).__doc__, name


def test_every_file_that_a_document_names_exists():
    for document in DOCUMENTS:
        text = document.read_text()
        for name in re.findall(r"`((?:ddpm_jax|tests|configs|docs)/[\w/]+\.\w+)`", text):
            assert (ROOT / name).exists(), f"{document.name}: {name}"
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_architecture_has_every_module_in_the_order_of_imports():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)]
    package = ROOT / "ddpm_jax"
    there = [str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(there)
    wings = [name.split("/")[0].removesuffix(".py") for name in named]
    places = [WINGS.index(wing) for wing in wings]
    assert places == sorted(places)


def commands_of(text):
    """(script, words) of every command in a document; lines may go on after a backslash, and in quotes on the next line."""
    text = re.sub(r" \\\n +", " ", text)
    inline = re.findall(r"`python (\w+)\.py ([^`]*)`|`ddpm-jax ([^\s`]+) ([^`]*)`", text)
    blocks = re.findall(
        r"^python (\w+)\.py (.*?)(?: +#.*|   .*)?$|^ddpm-jax (\S+) (.*?)(?: +#.*)?$", text, re.MULTILINE
    )
    for script, words, command, others in blocks + inline:
        yield (script or command).replace("-", "_"), shlex.split(words or others)


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_command_line_can_be_parsed(document, monkeypatch):
    """As far as that does not need the run, the pictures or the weights."""
    monkeypatch.chdir(ROOT)
    commands = list(commands_of(document.read_text()))
    if document.name == "README.md" and document.parent == ROOT:
        assert {name for name, _ in commands} == set(PARSERS) - {"configs", "env"}
    for name, words in commands:
        if name in PARSERS and not PLACEHOLDERS & set(words):
            PARSERS[name](words)


def test_the_configs_of_the_table_exist():
    for name in re.findall(r"train\.py (configs/\w+\.py)", README):
        assert (ROOT / name).is_file()
    for name in re.findall(r"ddpm-jax train (\w+) ", README):
        assert (ROOT / "configs" / f"{name}.py").is_file()
