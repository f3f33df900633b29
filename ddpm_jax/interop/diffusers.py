"""Models of diffusers: importing one from a folder or the hub, and exporting a run for its `DDPMPipeline`.

It reads and writes JSON and safetensors without diffusers, and executes no code of a model.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save

from ddpm_jax.config import Config, differences, num_labels
from ddpm_jax.core.errors import UsageError, first_line, import_extra
from ddpm_jax.core.files import advising, check_place, read_json
from ddpm_jax.interop.diffusers_config import VERSION, from_diffusers_configs, scheduler_config, unet_config
from ddpm_jax.interop.names import Parameter, parameters
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.parameters import arrays_digest, check_fit, flatten, unflatten
from ddpm_jax.training.workdir import Run, check_empty

WEIGHTS = "diffusion_pytorch_model"
DIGEST = "ddpm_jax_sha256"  # among the metadata of exported weights
OF_THE_MODEL = {  # fields that the model fixes
    *("data.image_size", "data.channels", "data.condition"),
    *("model.ch", "model.ch_mult", "model.num_res_blocks", "model.attn_resolutions", "model.groups"),
    *("diffusion.prediction", "diffusion.variance"),
}
OF_THE_SCHEDULE = {"diffusion.T", "diffusion.schedule", "diffusion.beta_start", "diffusion.beta_end"}


def read_model(source: str, base: Config | None = None) -> tuple[Config, Any]:
    """Reads a `UNet2DModel` or `DDPMPipeline`: our config and the parameters (float32 NumPy).

    A folder without a scheduler's config gets the paper's schedule. Its variance is the base's, or learned if there are two
    outputs for each channel.

    Args:
        source: A folder, or an id on the hub such as google/ddpm-cifar10-32.
        base: A config of the same network and diffusion, for the data and training options; without it data.source is `none`.

    Raises:
        UsageError: If a file is missing or damaged, or the model is not one of our networks.
    """
    folder = _find_folder(source)
    unet_folder = folder / "unet" if (folder / "unet").is_dir() else folder
    unet = _read_json(unet_folder / "config.json")
    schedulers = [
        p for p in (folder / "scheduler/scheduler_config.json", folder / "scheduler_config.json") if p.exists()
    ]
    scheduler = _read_json(schedulers[0]) if schedulers else None
    try:
        config = from_diffusers_configs(unet, scheduler)
    except UsageError as error:
        raise UsageError(f"{source} cannot be imported: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise UsageError(f"{source} cannot be imported: its config is not one of diffusers ({error})") from None
    if base is not None:
        config = _with_options_of(base, config, source, without_scheduler=scheduler is None)
    return config, _read_parameters(unet_folder, parameters(Experiment.from_config(config)), [unet, scheduler])


def _find_folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise UsageError(
            f"{source} is not a folder; give one with a config.json, or a hub id such as google/ddpm-cifar10-32"
        )
    hub = import_extra("huggingface_hub", "hub", f"{source}, which is no folder but may be on the hub,")
    try:
        configs = ["config.json", "*/config.json", "*scheduler_config.json"]
        folder = Path(hub.snapshot_download(source, allow_patterns=[*configs, f"*{WEIGHTS}.safetensors"]))
        if not [*folder.rglob(f"{WEIGHTS}.safetensors")]:
            folder = Path(hub.snapshot_download(source, allow_patterns=[*configs, f"*{WEIGHTS}.bin"]))
        return folder
    except Exception as error:  # the network, the hub and the cache each have their own errors
        raise UsageError(
            f"{source} is not a folder and could not be downloaded ({first_line(error)}); "
            "check the name and the network"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UsageError(f"{path.parent} has no {path.name}; give the folder of a diffusers model")
    with advising("get a whole copy of the file"):
        return read_json(epath.Path(path))


def _with_options_of(base: Config, config: Config, source: str, *, without_scheduler: bool) -> Config:
    ours, theirs = Experiment.from_config(base).process, Experiment.from_config(config).process
    betas, others = ours.schedule.betas, theirs.schedule.betas
    # Equal betas may have different names: a const schedule is also a linear one.
    same = betas.shape == others.shape and np.allclose(betas, others, rtol=1e-5, atol=0)
    names = OF_THE_MODEL | (set() if same else OF_THE_SCHEDULE)
    if without_scheduler and ours.learns_variance == theirs.learns_variance:
        names -= {"diffusion.variance"}  # the model does not record it
    if num_labels(base) != num_labels(config):  # diffusers does not tell which label is that of no class
        names |= {"model.num_classes"}
    differ = [
        f"{name} ({there!r} there, {here!r} in the config)"
        for name, (here, there) in differences(base, config).items()
        if name in names
    ]
    if differ:
        raise UsageError(f"{source} is not the config's model: it differs in {', '.join(differ)}; change the config")
    return base


def _read_parameters(folder: Path, table: tuple[Parameter, ...], configs: list[Any]) -> Any:
    path, pickled = (folder / f"{WEIGHTS}.{ending}" for ending in ("safetensors", "bin"))
    if path.exists():
        tensors, digest = _read_safetensors(path)
        if digest is not None and digest != arrays_digest(configs, tensors):  # models of diffusers have none
            raise UsageError(
                f"{path} or a config beside it is damaged or changed: it is not what ddpm_jax exported; get a whole copy"
            )
    elif pickled.exists():
        path, tensors = pickled, _read_pickle(pickled)
    else:
        raise UsageError(
            f"{folder} has neither {path.name} nor {pickled.name}; give the folder of a whole diffusers model"
        )
    names = {p.diffusers_old if p.diffusers_old in tensors else p.diffusers: p for p in table}
    check_fit(
        {name: array.shape for name, array in tensors.items()},
        {name: p.diffusers_shape for name, p in names.items()},
        path,
    )
    for name, array in tensors.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UsageError(
                f"{path} holds {name} as {array.dtype}, expected floating point; get the weights unquantised"
            )
    return unflatten({p.path: np.ascontiguousarray(p.from_diffusers(tensors[n]), np.float32) for n, p in names.items()})


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The tensors of a file, and their digest if ddpm_jax exported them."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get(DIGEST)  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); get a whole copy of the file") from None
    except (AttributeError, TypeError) as error:  # NumPy has no type of that name
        raise UsageError(f"{path} holds a type that NumPy lacks ({error}); get the weights unquantised") from None


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    torch = import_extra("torch", "torch", str(path), f"get {WEIGHTS}.safetensors instead")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in state.items()}
    except Exception:  # a pickle can raise any error, with any message
        raise UsageError(
            f"{path} is damaged or holds something other than weights, so it was not used; "
            f"get {WEIGHTS}.safetensors instead"
        ) from None


def check_new(folder: Path) -> None:
    """Raises UsageError unless the folder is empty or new, and can be written."""
    check_place(folder / "model_index.json", "give another folder")
    check_empty(epath.Path(folder))
    if not folder.name:
        raise UsageError(f"{folder} cannot be replaced by a folder; give the name of a new one")


def write_pipeline(run: Run, folder: Path, card: str) -> None:
    """Writes a run atomically as a folder that `DDPMPipeline.from_pretrained` loads, with the card as its README.md.

    Raises UsageError if the folder is not empty, or diffusers' scheduler cannot sample the run.
    """
    run.experiment.check_unconditional("a pipeline of diffusers")
    files = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "scheduler/scheduler_config.json": scheduler_config(run.experiment),
        "unet/config.json": unet_config(run.experiment),
    }
    arrays = flatten(run.params)
    tensors = {
        p.diffusers: np.ascontiguousarray(p.to_diffusers(np.asarray(arrays[p.path])))
        for p in parameters(run.experiment)
    }
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / folder.name
        for name, values in files.items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_text(json.dumps(values, indent=2) + "\n")
        # Not by save_file, which raises its own error on a full disk.
        proof = {DIGEST: arrays_digest([files["unet/config.json"], files["scheduler/scheduler_config.json"]], tensors)}
        (whole / f"unet/{WEIGHTS}.safetensors").write_bytes(save(tensors, metadata={"format": "pt"} | proof))
        (whole / "README.md").write_text(card)
        whole.replace(folder)
