"""The config of a run, WORKDIR/config.json."""

from etils import epath

from ddpm_jax.config import Config, ConfigError, check, from_json
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import read_json

CONFIG = "config.json"


def read_config(workdir: epath.Path, *, own_network: bool = False) -> Config:
    """The config of a workdir. Raises UsageError if the folder is no workdir, or its config cannot be read or used.

    own_network: the run's network is not the U-Net of the config.
    """
    if not workdir.exists():
        raise UsageError(f"{workdir} does not exist; give the folder of a run that train.py made")
    if not workdir.is_dir():
        raise UsageError(f"{workdir} is a file; give the folder of a run that train.py made")
    path = workdir / CONFIG
    if not path.exists():
        raise UsageError(f"{workdir} has no {CONFIG}; give the folder of a run that train.py made")
    values = read_json(path)
    try:
        config = from_json(values)
        check(config, num_devices=None, own_network=own_network)
    except ConfigError as error:
        raise UsageError(
            f"{path} cannot be used ({error}); restore it from a copy, or write what the run had there"
        ) from None
    return config
