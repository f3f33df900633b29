"""The commit of this checkout, which figures are measured at."""

import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def commit(checkout: Path = CHECKOUT) -> str:
    """The commit of a checkout, marked dirty if files have been changed since; empty if there is none, or no git."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
