"""Prepares or checks a data set: ddpm-jax prepare-data tfds:cifar10; ddpm-jax prepare-data SOURCE --check

SOURCE is what data.source takes: a folder or a zip file of pictures, or tfds:NAME[:split].
"""

from ddpm_jax.commands.arguments import PrepareData
from ddpm_jax.config import Config, DataConfig, check
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import cache, sources, tfds


def main(arguments: PrepareData) -> None:
    """Prepares or checks the source."""
    source = arguments.source
    if arguments.check:
        check_pictures(arguments)
    elif source.startswith(tfds.PREFIX):
        print(f"{source} is prepared: {tfds.prepare(source)}")
    else:
        sources.find_kind(source)
        raise UsageError(f"{source} needs no preparation; add --check to look for pictures that cannot be decoded")


def check_pictures(arguments: PrepareData) -> None:
    """Prints the pictures that cannot be decoded and writes their list; exit code 1 if there are any."""
    a = arguments
    data = DataConfig(source=a.source, channels=a.channels, value_range=a.value_range, workers=a.workers)
    check(Config(data=data))
    images = sources.decoded(sources.open_pictures(a.source), data)
    bad = cache.find_bad(images)
    for name, reason in bad.items():
        print(f"{name}: {reason}")
    print(f"{len(bad)} of {len(images)} pictures cannot be decoded; their list: {cache.write_bad(images, bad)}")
    raise SystemExit(1 if bad else 0)
