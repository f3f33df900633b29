"""Lists the configs that come with the package: ddpm-jax configs

Their folder lies beside the package in the repository, and inside of it once it is installed.
"""

import ast
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
FOLDER = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def shipped() -> dict[str, Path]:
    """The shipped config files by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.py"))}


def main(arguments: Any) -> None:
    """Lists the configs."""
    width = max(map(len, shipped()))
    for name, path in shipped().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"{name:{width}}  {next(iter(text.splitlines()), '')}")
    print(f"For a config of your own, copy one of them from {FOLDER} and give the path of the copy.")
