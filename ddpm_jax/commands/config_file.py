"""Loads a config: a shipped one by its name, or a file by its path.

No other file is executed: a config file is the user's own program.
"""

import difflib
import importlib.util
import shlex
from pathlib import Path

from ddpm_jax.commands.configs import shipped
from ddpm_jax.config import Config, check_types, differences
from ddpm_jax.core.errors import UsageError


def load_config(name: str) -> Config:
    """The config of a name such as cifar10, in every folder the shipped one, or of a path such as mine.py.

    Raises UsageError if there is none, with what is named most alike.
    """
    path = shipped().get(name, Path(name))
    if not path.is_file():
        there = {name: name for name in shipped()} | {near.stem: str(near) for near in path.parent.glob("*.py")}
        near = difflib.get_close_matches(path.stem, there, n=1, cutoff=0.5)
        hint = f"perhaps you meant {there[near[0]]}" if near else f"give a file, or one of {', '.join(shipped())}"
        if path.suffix:
            raise UsageError(f"the config {name} does not exist; {hint}")
        # A mistyped folder of pictures or of a run, perhaps.
        raise UsageError(f"there is no file or folder {name}, and no config of that name; {hint}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the config {name} is not a Python file; give NAME.py, or a name that ddpm-jax configs lists")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"the config {name} cannot be executed ({type(error).__name__}: {error})") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UsageError(f"the config {name} does not define `config = Config(...)`")
    check_types(config)
    return config


def options_of(given: Config, config: Config) -> list[str]:
    """The options that turn the given config into the other: words for each field that differs."""
    words = []
    for field, (_, value) in differences(given, config).items():
        section, _, last = field.rpartition(".")
        prefix, option = f"--{section}." if section else "--", last.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"{prefix}{option}" if value else f"{prefix}no-{option}")
        else:
            words += [f"{prefix}{option}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def command_of(config: Config, workdir: str) -> str:
    """The command that trains a config: the shipped config that differs least, and an option for each field that differs."""
    there = {name: load_config(name) for name in shipped()}
    name = min(there, key=lambda name: len(differences(there[name], config)))
    return shlex.join(["ddpm-jax", "train", name, "--workdir", workdir, *options_of(there[name], config)])


def are_pictures(name: str) -> bool:
    """Whether what stands in the config's place is pictures: a folder or a zip file, and no shipped config's name."""
    return name not in shipped() and (Path(name).is_dir() or Path(name).suffix.lower() == ".zip")
