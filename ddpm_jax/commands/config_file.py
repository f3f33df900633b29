"""Loads a config file, configs/NAME.py. No other file is executed: a config file is the user's own program."""

import difflib
import importlib.util
from pathlib import Path

from ddpm_jax.config import Config, check_types
from ddpm_jax.core.errors import UsageError


def load_config(name: str) -> Config:
    """The `config` of a config file. Raises UsageError if there is none, with the name of the most similar file."""
    path = Path(name)
    if not path.is_file():
        there = sorted(str(p) for p in Path("configs").glob("*.py"))
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
        hint = f"perhaps you meant {near[0]}" if near else f"there are {', '.join(there) or 'none in configs/'}"
        raise UsageError(f"the config {name} does not exist; {hint}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the config {name} is not a Python file; give configs/NAME.py")
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


def are_pictures(name: str) -> bool:
    """Whether what stands in the config's place is pictures: a folder or a zip file."""
    return Path(name).is_dir() or Path(name).suffix.lower() == ".zip"
