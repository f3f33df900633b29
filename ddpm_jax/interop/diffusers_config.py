"""Translates between our config and those of diffusers' `UNet2DModel` and `DDPMScheduler`."""

import json
from typing import Any

import numpy as np

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, check, num_labels
from ddpm_jax.core.errors import UsageError
from ddpm_jax.diffusion.schedules import BETAS
from ddpm_jax.training.experiment import Experiment

VERSION = "0.35.0"  # of diffusers, with these fields

# Our network in diffusers' fields.
_NETWORK: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": 1e-6,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
# diffusers' own defaults for missing fields, where they differ from the values above.
_NETWORK_DEFAULTS: dict[str, Any] = {
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 2,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": None,
}
_SAMPLER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "thresholding": False,
}
_SAMPLER_DEFAULTS: dict[str, Any] = _SAMPLER | {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
    "variance_type": "fixed_small",
}
_SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
MOST_LEVELS, MOST_CHANNELS, MOST_STEPS = 16, 2**15, 10**6
MOST_CLASSES = 10**6
_MOST = {"in_channels": 64, "layers_per_block": 32, "norm_num_groups": MOST_CHANNELS, "sample_size": 2**14}
PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
# Their "learned" is the variance, ours its logarithm, so "learned" has no counterpart.
_VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned_range": "learned_range"}


def unet_config(experiment: Experiment) -> dict[str, Any]:
    """The config of the `UNet2DModel` that equals the experiment's network."""
    return _unet_fields(experiment.config)


def _unet_fields(config: Config) -> dict[str, Any]:
    """`unet_config` of a config that may not be one that can be run."""
    data, model = config.data, config.model
    attends = [min(data.size) // 2**i in model.attn_resolutions for i in range(len(model.ch_mult))]
    return _NETWORK | {
        "_diffusers_version": VERSION,
        "block_out_channels": [model.ch * mult for mult in model.ch_mult],
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "dropout": model.dropout,
        "in_channels": data.channels,
        "layers_per_block": model.num_res_blocks,
        "norm_num_groups": model.groups,
        "num_class_embeds": num_labels(config) or None,
        "out_channels": data.channels * (2 if config.diffusion.variance in ("learned", "learned_range") else 1),
        "sample_size": list(data.size) if isinstance(data.image_size, tuple) else data.image_size,
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
    }


def scheduler_config(experiment: Experiment) -> dict[str, Any]:
    """The config of the `DDPMScheduler` that equals our `ancestral` sampler. Raises UsageError if there is none."""
    d = experiment.config.diffusion
    for name, ours, table in [("prediction", d.prediction, PREDICTIONS), ("variance", d.variance, _VARIANCES)]:
        if ours not in table:
            raise UsageError(
                f"diffusers' DDPMScheduler has no counterpart of diffusion.{name}={ours}, only of "
                f"{', '.join(table)}; export the weights to a .safetensors file instead"
            )
    named = d.schedule in _SCHEDULES
    return _SAMPLER | {
        "_diffusers_version": VERSION,
        "beta_end": d.beta_end,
        "beta_schedule": _SCHEDULES[d.schedule] if named else "linear",
        "beta_start": d.beta_start,
        "num_train_timesteps": d.T,
        "prediction_type": PREDICTIONS[d.prediction],
        "trained_betas": None if named else experiment.process.schedule.betas.tolist(),
        "variance_type": _VARIANCES[d.variance],
    }


def from_diffusers_configs(unet: dict[str, Any], scheduler: dict[str, Any] | None) -> Config:
    """Our config for a network and a scheduler of diffusers, with data.source `none` and default training options.

    All of `num_class_embeds` are classes: if the last one means no class, give a config that says so.

    Without a scheduler it takes the paper's schedule, and the variance learned_range if there are two outputs for each channel.
    Raises UsageError with the fields that our network or sampler cannot represent.
    """
    given = _NETWORK | _NETWORK_DEFAULTS | unet
    missing = [name for name in ("block_out_channels", "down_block_types", "up_block_types") if name not in given]
    if missing:
        raise UsageError(f"its network's config has no {missing[0]}; give the folder of a UNet2DModel")
    _check_sizes(given)
    if scheduler is None:
        learned = given["out_channels"] == 2 * given["in_channels"]
        scheduler = {"variance_type": "learned_range" if learned else "fixed_large"}
    diffusion = _diffusion(scheduler)
    attends = [kind == "AttnDownBlock2D" for kind in given["down_block_types"]]
    widths, size = given["block_out_channels"], given["sample_size"]
    if isinstance(size, list):
        size = tuple(size * 2 if len(size) == 1 else size)
    if not isinstance(size, int) and (not isinstance(size, tuple) or len(size) != 2):
        raise UsageError(f"its network's sample_size is {json.dumps(size)}, expected one number, or height and width")
    ch, data = widths[0], DataConfig(source="none", image_size=size, channels=given["in_channels"])
    config = Config(
        data=data,
        model=ModelConfig(
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=given["layers_per_block"],
            attn_resolutions=tuple(min(data.size) // 2**i for i, attend in enumerate(attends) if attend),
            dropout=given["dropout"],
            groups=given["norm_num_groups"],
            num_classes=given["num_class_embeds"] or 0,
        ),
        diffusion=diffusion,
    )
    one_head = {width for width, attend in zip(widths, attends, strict=False) if attend} | {widths[-1]}
    other_words = {  # other values that mean the same network
        "act_fn": given["act_fn"] == "swish",
        "attention_head_dim": {given["attention_head_dim"]} == one_head,
        "attn_norm_num_groups": given["attn_norm_num_groups"] == given["norm_num_groups"],
        "num_train_timesteps": True,  # only a learned embedding of t uses it
        "sample_size": True,  # checked above
        "time_embedding_dim": given["time_embedding_dim"] == 4 * ch,
    }
    ours = _unet_fields(config)
    _refuse_differences(given | {name: ours.get(name) for name, same in other_words.items() if same}, ours, "network")
    check(config)
    return config


def _check_sizes(given: dict[str, Any]) -> None:
    """Raises UsageError for sizes beyond those of any known network, before anything is allocated."""
    for name, most in _MOST.items():
        _check_most(given, name, most, "network")
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(given[name], list) or not 1 <= len(given[name]) <= MOST_LEVELS:
            raise UsageError(f"its network's {name} is no list of 1 to {MOST_LEVELS} levels; give another model")
    if given["num_class_embeds"] is not None:
        _check_most(given, "num_class_embeds", MOST_CLASSES, "network")
    for width in given["block_out_channels"]:
        _check_most({"block_out_channels": width}, "block_out_channels", MOST_CHANNELS, "network")


def _check_most(given: dict[str, Any], name: str, most: int, what: str) -> None:
    for value in given[name] if isinstance(given[name], list) else [given[name]]:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            said = json.dumps(value)[:40]
            raise UsageError(
                f"its {what}'s {name} is {said}, expected a whole number from 1 to {most}; give another model"
            )


def _diffusion(scheduler: dict[str, Any]) -> DiffusionConfig:
    given = _SAMPLER_DEFAULTS | scheduler
    _check_most(given, "num_train_timesteps", MOST_STEPS, "sampler")
    _refuse_differences({name: given[name] for name in _SAMPLER}, _SAMPLER, "sampler")
    if given["variance_type"] == "fixed_small_log":  # the same, computed another way
        given["variance_type"] = "fixed_small"
    schedule, beta_start, beta_end = _schedule(given)
    variance = _ours(_VARIANCES, given, "variance_type")
    return DiffusionConfig(
        T=given["num_train_timesteps"],
        schedule=schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        prediction=_ours(PREDICTIONS, given, "prediction_type"),
        variance=variance,
        loss="rescaled_hybrid" if variance == "learned_range" else "simple",
    )


def _schedule(given: dict[str, Any]) -> tuple[Any, float, float]:
    """Name, beta_start and beta_end of the schedule; explicit betas must equal one of our schedules."""
    if given["trained_betas"] is None:
        return _ours(_SCHEDULES, given, "beta_schedule"), given["beta_start"], given["beta_end"]
    betas = np.array(given["trained_betas"], np.float64)
    beta_start, beta_end = float(betas[0]), float(betas[-1])
    for name, make_betas in BETAS.items():
        ours = make_betas(given["num_train_timesteps"], beta_start, beta_end)
        if ours.shape == betas.shape and np.allclose(ours, betas, rtol=1e-5, atol=0):
            return name, beta_start, beta_end
    raise UsageError(f"its sampler's trained_betas match no schedule; there are {', '.join(BETAS)}")


def _ours(table: dict[str, str], given: dict[str, Any], field: str) -> Any:
    for ours, theirs in table.items():
        if theirs == given[field]:
            return ours
    raise UsageError(
        f"its sampler's {field} is {json.dumps(given[field])}, expected one of {', '.join(table.values())}"
    )


def _refuse_differences(given: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    differ = [
        f"{name} is {json.dumps(value)}, expected {json.dumps(ours.get(name))}"
        for name, value in given.items()
        if (name == "_class_name" or not name.startswith("_"))  # others are notes, such as the version
        and value != ours.get(name)
        and (name in ours or value)  # an unknown field is accepted if it is off
    ]
    if differ:
        raise UsageError(f"its {what} is not one of ddpm_jax: {', '.join(differ)}; give a model that agrees in these")
