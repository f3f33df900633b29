"""A config for a folder or a zip file of pictures that stands in the config's place: train.py PICTURES --workdir WORKDIR"""

import argparse
import dataclasses
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from etils import epath
from PIL import Image
from tqdm import tqdm

from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import Config
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data.pictures import FORMATS, Pictures
from ddpm_jax.data.sources import open_pictures
from ddpm_jax.training.checkpoint import saved_steps
from ddpm_jax.training.config_json import CONFIG, read_config
from ddpm_jax.training.workdir import CHECKPOINTS

SMALL = "folder_small"
LOOKED_AT = 256  # pictures whose size and mode are read
GREY = ("1", "L", "LA", "I", "I;16")  # Pillow's modes


def config_of_pictures(name: str, command_line: Sequence[str]) -> Config:
    """The config of a run on these pictures: folder_small.py's, with the size and channels that fit them.

    Pictures of at least 32 pixels on the shorter side, by their median, are trained at 32 x 32, smaller ones at 16 x 16.
    Says what it chose. If the command line's workdir has a checkpoint, the config is that run's, so that the same command
    continues it. Raises UsageError if no picture can be read, or the folder is a run's.
    """
    if (Path(name) / CONFIG).exists():
        raise UsageError(
            f"{name} is the folder of a run; to continue it, give the config or the pictures it was begun with"
        )
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", default="")
    workdir = parser.parse_known_args(command_line)[0].workdir
    if workdir and saved_steps(epath.Path(workdir) / CHECKPOINTS):
        config = read_config(epath.Path(workdir))
        return dataclasses.replace(config, data=dataclasses.replace(config.data, source=name))
    config, pictures = load_config(SMALL), open_pictures(name)
    side, channels = look_at(pictures)
    # Never enlarge most of them: that would cost time and show nothing.
    size = min(config.data.size)
    size = size if side >= size else size // 2
    tqdm.write(
        f"{len(pictures.names):,} pictures, half of them at least {side} pixels on the shorter side: trained at {size} x {size}, "
        f"{'grey' if channels == 1 else 'in colour'}, with the small network of {SMALL} for "
        f"{config.train.steps:,} steps. WORKDIR/{CONFIG} says it all, and each field is an option: --train.steps, --data.channels"
    )
    data = dataclasses.replace(config.data, source=name, image_size=size, channels=channels)
    return dataclasses.replace(config, data=data)


def look_at(pictures: Pictures) -> tuple[int, Literal[1, 3]]:
    """The median of the shorter sides, and the channels: 1 if all are grey. Of some of the pictures, equally spaced."""
    count, sides, modes = len(pictures.names), [], set()
    for i in range(0, count, -(-count // LOOKED_AT)):
        try:
            with Image.open(io.BytesIO(pictures.read(i)), formats=FORMATS) as picture:
                sides.append(min(picture.size))
                modes.add(picture.mode)
        except Exception:  # a damaged picture can raise any error; it is named where the pictures are decoded
            continue
    if not sides:
        raise UsageError(
            "none of the pictures can be read; ddpm-jax prepare-data PICTURES --check names each with the reason"
        )
    return int(statistics.median(sides)), 1 if modes <= set(GREY) else 3
