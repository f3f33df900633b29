"""What defines a run: frozen dataclasses with defaults, help, cross-field checks and a JSON round trip.

The text under each field is its help on the command line. The defaults are the paper's CIFAR-10 recipe.
"""

import dataclasses
import json
import sys
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ddpm_jax.diffusion.process import Prediction, Variance
from ddpm_jax.diffusion.schedules import Schedule, make_schedule
from ddpm_jax.errors import UsageError


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what they become."""

    source: str = "digits"
    """Where the images come from: a folder or a zip file of pictures, `tfds:NAME[:split]` (see prepare_data.py), a file
    `x.npy` or `x.npz` of uint8 images, or `digits` (embedded)."""
    image_size: int = 32
    """Height and width in pixels that the network sees; pictures are cropped and resized to it."""
    channels: int = 3
    """1 for grey images, 3 for RGB."""
    cache: Literal["auto", "device", "host", "none"] = "auto"
    """Decode pictures once and keep them on the devices or in a file that the host maps; none: decode them at every step.
    auto: device up to 1 GiB, host up to 8 GiB, else none. Changes speed only."""
    workers: int = 0
    """Threads that decode pictures; 0: one for each CPU core. Changes speed only."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What a picture that cannot be decoded does: stop the run, or be left out, if prepare_data.py --check listed it."""


@dataclass(frozen=True)
class ModelConfig:
    """The U-Net."""

    ch: int = 128
    """Base channels C."""
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in units of ch; each level after the first halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per level on the way down (one more on the way up)."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Resolutions with self-attention after every block (the middle always has it)."""
    dropout: float = 0.1
    """Probability that a feature is dropped in training."""
    groups: int = 32
    """Groups of every group normalisation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters, norm statistics, softmax, output and losses stay float32."""
    remat: bool = False
    """Recompute every block in the backward pass instead of storing its inside: less memory, about a third more time."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, what the network predicts, and the loss."""

    T: int = 1000
    """Number of diffusion steps."""
    schedule: Literal["linear", "quad", "const", "jsd", "warmup10", "warmup50", "cosine", "sigmoid"] = "linear"
    """Variance schedule."""
    beta_start: float = 1e-4
    """First beta (linear, quad, warmup10, warmup50, sigmoid)."""
    beta_end: float = 0.02
    """Last beta (linear, quad, const, warmup10, warmup50, sigmoid)."""
    prediction: Prediction = "eps"
    """What the network's output stands for."""
    variance: Variance = "fixed_large"
    """Variance of p(x_{t-1} | x_t); the learned ones double the output channels."""
    loss: Literal["simple", "vb", "rescaled_vb", "hybrid", "rescaled_hybrid"] = "simple"
    """L_simple, the variational bound's term, or both (the hybrid ones need a learned variance)."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """Weight of each t in the simple loss."""
    min_snr_gamma: float = 5.0
    """Where min-SNR weighting clips the signal-to-noise ratio."""
    t_sampler: Literal["uniform", "loss_history"] = "uniform"
    """How t is drawn in training: uniformly, or by importance from the history of losses."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and what is written on the way."""

    steps: int = 800_000
    """Last step; the same command continues up to it, and stops there."""
    batch_size: int = 128
    """Images per step, over all devices and processes."""
    accumulation: int = 1
    """Parts that a batch's gradient is summed from, one after the other: less memory, same result to rounding."""
    lr: float = 2e-4
    """Adam's learning rate after the warm-up."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly from 0."""
    adam_b1: float = 0.9
    """Adam's decay of the first moment."""
    adam_b2: float = 0.999
    """Adam's decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the parameters, which samples are drawn from."""
    flip: bool = True
    """Mirror half of the images, drawn anew at every step."""
    steps_per_dispatch: int = 1
    """Steps that run on the devices without the host; divides steps and every interval below."""
    log_every: int = 100
    """Steps between two log lines."""
    sample_every: int = 10_000
    """Steps between two sample grids; 0: none."""
    num_samples: int = 64
    """Images of a sample grid."""
    save_every: int = 5000
    """Steps between two checkpoints."""
    keep_last: int = 2
    """How many of the newest checkpoints stay, at least 2."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this as well; 0: none."""
    eval_every: int = 0
    """Steps between two evaluations of the EMA parameters on held-out images, each at a checkpoint; 0: none."""
    eval_source: str = ""
    """The held-out images, as data.source names them: a test split, say."""
    eval_images: int = 1024
    """How many of them, taken at equal distances, at least 2."""
    eval_samples: int = 0
    """Images drawn at each evaluation for the FID against the training images; 0: none."""
    eval_features: Literal["inception", "pixels"] = "inception"
    """What that FID compares images by: Inception-v3, or their bare pixels."""
    keep_best: Literal["eval_loss", "eval_bits_per_dim", "eval_fid"] = "eval_loss"
    """The checkpoint at which this was least is kept too: `--step best`."""
    init_from: str = ""
    """Workdir of a run whose EMA parameters this one starts from; empty: start from random ones."""
    fsdp: int = 1
    """Devices over which parameters, EMA and optimizer state are split, for models too big for one device."""


@dataclass(frozen=True)
class Config:
    """A run, but for the folder it is written to."""

    seed: int = 0
    """Seed of every random draw, 0 to 4294967295."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# What may change when a run is continued: how far it goes, how fast, and what it writes; not what it computes. Where its
# images come from and which are left out may change too, for the data set's identity is looked at by itself.
MAY_CHANGE = frozenset(
    {
        "data.cache",
        "data.on_bad_image",
        "data.source",
        "data.workers",
        "model.remat",
        "train.steps",
        "train.accumulation",
        "train.steps_per_dispatch",
        "train.log_every",
        "train.sample_every",
        "train.num_samples",
        "train.save_every",
        "train.keep_last",
        "train.keep_every",
        "train.eval_every",
        "train.eval_source",
        "train.eval_images",
        "train.eval_samples",
        "train.eval_features",
        "train.keep_best",
        "train.fsdp",
    }
)

MOST = 2**31 - 1  # the devices count in 32 bits


MOST_LAST_ALPHA_BAR = 0.01  # of a schedule that ends in noise; the paper's ends at 4e-5


class ConfigError(UsageError):
    """A config that cannot be run."""


def check(config: Config, *, num_devices: int | None = 1) -> list[str]:
    """Refuses a config that could not run, before anything is compiled; returns warnings, one sentence each.

    num_devices: devices over all processes, or None where a config is looked at that may be of other devices. Raises
    ConfigError.
    """
    check_types(config)
    _check_numbers(config)
    _check_network(config)
    schedule = _check_diffusion(config.diffusion)
    _check_intervals(config.train)
    if num_devices is not None:
        _check_devices(config.train, num_devices)
    warnings = []
    if config.train.warmup_steps > config.train.steps:
        warnings.append(
            f"train.warmup_steps={config.train.warmup_steps} is longer than the run of {config.train.steps} steps, "
            "so the learning rate never reaches train.lr"
        )
    if schedule.alphas_cumprod[-1] > MOST_LAST_ALPHA_BAR:
        warnings.append(_ends_early(config.diffusion, float(schedule.alphas_cumprod[-1])))
    return warnings


def _ends_early(diffusion: DiffusionConfig, last: float) -> str:
    """What a schedule whose last alpha-bar is far from 0 does, and which one to take."""
    remedies = ["diffusion.schedule=cosine"]
    if diffusion.schedule not in ("cosine", "jsd"):  # these have no betas of their own
        start, end = (beta * 1000 / diffusion.T for beta in (1e-4, 0.02))  # the paper's, of T = 1000
        if end < 1:
            scaled = make_schedule(diffusion.schedule, T=diffusion.T, beta_start=start, beta_end=end)
            if scaled.alphas_cumprod[-1] <= MOST_LAST_ALPHA_BAR:
                remedies.append(f"diffusion.beta_start={start:g} with diffusion.beta_end={end:g}")
    return (
        f"the {diffusion.schedule} schedule of diffusion.T={diffusion.T} ends at alpha-bar {last:.2g}, so x_T keeps "
        f"{np.sqrt(last):.2f} of the image where sampling starts from noise alone, and samples cannot be right; "
        f"use {' or '.join(remedies)}"
    )


def check_types(section: Any, prefix: str = "") -> None:
    """Refuses values that are not of their field's type. prefix: of the section's field names. Raises ConfigError."""
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value, hint, name = getattr(section, f.name), hints[f.name], prefix + f.name
        if dataclasses.is_dataclass(hint) and _matches(value, hint):
            check_types(value, name + ".")
        elif not _matches(value, hint):
            raise ConfigError(f"{name}={value!r} is not {_describe(hint)}")


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return False
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a tuple of whole numbers"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, f"a {hint.__name__}")


def _check_numbers(config: Config) -> None:
    model, train, data = config.model, config.train, config.data
    for name, value, low in [
        ("data.image_size", data.image_size, 1),
        ("data.workers", data.workers, 0),
        ("model.ch", model.ch, 4),
        ("model.num_res_blocks", model.num_res_blocks, 1),
        ("model.groups", model.groups, 1),
        ("train.steps", train.steps, 1),
        ("train.batch_size", train.batch_size, 1),
        ("train.accumulation", train.accumulation, 1),
        ("train.warmup_steps", train.warmup_steps, 0),
        ("train.steps_per_dispatch", train.steps_per_dispatch, 1),
        ("train.log_every", train.log_every, 1),
        ("train.sample_every", train.sample_every, 0),
        ("train.num_samples", train.num_samples, 1),
        ("train.save_every", train.save_every, 1),
        ("train.keep_last", train.keep_last, 2),
        ("train.keep_every", train.keep_every, 0),
        ("train.eval_every", train.eval_every, 0),
        ("train.eval_images", train.eval_images, 2),
        ("train.eval_samples", train.eval_samples, 0),
        ("train.fsdp", train.fsdp, 1),
    ]:
        if value < low:
            raise ConfigError(f"{name}={value} is too small; use {low} or more")
    for name, value, high in [
        ("data.image_size", data.image_size, MOST),
        ("data.workers", data.workers, 1024),
        ("model.ch", model.ch, MOST),
        ("the number of levels of model.ch_mult", len(model.ch_mult), 31),
        ("the largest of model.ch_mult", max(model.ch_mult, default=0), MOST),
        ("the number of model.attn_resolutions", len(model.attn_resolutions), 31),
        ("model.num_res_blocks", model.num_res_blocks, 100),
        ("diffusion.T", config.diffusion.T, 1_000_000),
        ("train.steps", train.steps, MOST),
        ("train.warmup_steps", train.warmup_steps, MOST),
        ("train.steps_per_dispatch", train.steps_per_dispatch, MOST),
        ("train.batch_size", train.batch_size, MOST),
        ("train.num_samples", train.num_samples, MOST),
        ("train.eval_images", train.eval_images, MOST),
        ("train.eval_samples", train.eval_samples, MOST),
    ]:
        if value > high:
            raise ConfigError(f"{name}={value} is too large; use {high} or less")
    for name, fraction in [
        ("model.dropout", model.dropout),
        ("train.ema_decay", train.ema_decay),
        ("train.adam_b1", train.adam_b1),
        ("train.adam_b2", train.adam_b2),
    ]:
        if not 0 <= fraction < 1:
            raise ConfigError(f"{name}={fraction} is outside of [0, 1); choose a value inside")
    for name, positive in [
        ("train.lr", train.lr),
        ("train.adam_eps", train.adam_eps),
        ("train.grad_clip", train.grad_clip),
        ("diffusion.min_snr_gamma", config.diffusion.min_snr_gamma),
    ]:
        if not 0 < positive < float("inf"):
            raise ConfigError(f"{name}={positive} is not a positive number")
    if data.channels not in (1, 3):
        raise ConfigError(f"data.channels={data.channels} is neither 1 (grey) nor 3 (RGB)")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed={config.seed} is outside of 0 .. 4294967295")


def _check_network(config: Config) -> None:
    model, size = config.model, config.data.image_size
    for name, values in [("model.ch_mult", model.ch_mult), ("model.attn_resolutions", model.attn_resolutions)]:
        if not values:
            raise ConfigError(f"{name} is empty; give at least one number")
        if min(values) < 1:
            raise ConfigError(f"{name}={values} has a number below 1")
    halvings = len(model.ch_mult) - 1
    if size % 2**halvings:
        raise ConfigError(
            f"data.image_size={size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.ch_mult={model.ch_mult} ask; use a multiple of {2**halvings}"
        )
    resolutions = [size // 2**i for i in range(halvings + 1)]
    for resolution in model.attn_resolutions:
        if resolution not in resolutions:
            raise ConfigError(
                f"model.attn_resolutions has {resolution}, but the network's resolutions are "
                f"{', '.join(map(str, resolutions))}; choose among these"
            )
    if model.ch % 2:
        raise ConfigError(f"model.ch={model.ch} is odd, but the time embedding has two halves; use an even number")
    if model.ch % model.groups:  # of the first convolution's channels; all others are multiples of them
        raise ConfigError(f"model.groups={model.groups} does not divide model.ch={model.ch}; change one of them")


def _check_diffusion(diffusion: DiffusionConfig) -> Schedule:
    try:
        schedule = make_schedule(
            diffusion.schedule, T=diffusion.T, beta_start=diffusion.beta_start, beta_end=diffusion.beta_end
        )
    except ValueError as error:
        raise ConfigError(f"diffusion: {error}") from None
    last = schedule.alphas_cumprod[-1]
    # The factor of x_t in x_0, 1 / sqrt(alphas_cumprod), must be finite in float32.
    overflows = schedule.sqrt_recip_alphas_cumprod[-1] > np.finfo(np.float32).max
    if (diffusion.prediction == "eps" and overflows) or (diffusion.prediction == "v" and last == 0):
        raise ConfigError(
            f"diffusion.prediction={diffusion.prediction} cannot be used with diffusion.schedule={diffusion.schedule}, "
            f"whose last alphas_cumprod is {last:g}, where x_0 does not follow from it; use x_0 or x_prev"
        )
    learned = diffusion.variance in ("learned", "learned_range")
    if learned and diffusion.loss == "simple":
        raise ConfigError(
            f"diffusion.variance={diffusion.variance} is never trained by diffusion.loss=simple; "
            "use loss vb, hybrid or rescaled_hybrid, or a fixed variance"
        )
    if diffusion.loss in ("hybrid", "rescaled_hybrid") and not learned:
        raise ConfigError(
            f"diffusion.loss={diffusion.loss} needs a learned variance, got diffusion.variance={diffusion.variance}; "
            "use learned or learned_range"
        )
    if diffusion.loss_weighting == "min_snr" and (diffusion.loss != "simple" or diffusion.prediction == "x_prev"):
        raise ConfigError(
            "diffusion.loss_weighting=min_snr is defined for diffusion.loss=simple with prediction eps, x_0 or v, "
            f"got loss {diffusion.loss} and prediction {diffusion.prediction}"
        )
    return schedule


def _check_intervals(train: TrainConfig) -> None:
    for name in ("steps", "log_every", "sample_every", "save_every"):
        value = getattr(train, name)
        if value % train.steps_per_dispatch:
            raise ConfigError(
                f"train.{name}={value} is not a multiple of train.steps_per_dispatch={train.steps_per_dispatch}; "
                "change one of them"
            )
    for name in ("keep_every", "eval_every"):
        value = getattr(train, name)
        if value % train.save_every:
            raise ConfigError(
                f"train.{name}={value} is not a multiple of train.save_every={train.save_every}, "
                "so no such checkpoint would be written; change one of them"
            )
    if train.eval_every and not train.eval_source:
        raise ConfigError(
            f"train.eval_every={train.eval_every} has no held-out images; name them with train.eval_source"
        )
    if train.eval_every and train.keep_best == "eval_fid" and not train.eval_samples:
        raise ConfigError("train.keep_best=eval_fid needs samples to take the FID of; set train.eval_samples")
    if train.eval_samples == 1:
        raise ConfigError("train.eval_samples=1 has no covariance; use 2 or more, or 0 for none")


def _check_devices(train: TrainConfig, num_devices: int) -> None:
    if num_devices % train.fsdp:
        raise ConfigError(f"train.fsdp={train.fsdp} does not divide the {num_devices} devices; choose a divisor")
    parts = num_devices * train.accumulation
    if train.batch_size % parts:
        factors = {"the %d devices": num_devices, "train.accumulation=%d": train.accumulation}
        by = " times ".join(name % factor for name, factor in factors.items() if factor > 1)
        low = train.batch_size // parts * parts
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not divisible by {by}; use "
            + (f"{low} or {low + parts}" if low else f"{parts}")
        )


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_json(values: Any) -> Config:
    """The config of `to_json`; fields that are not there have their defaults. Raises ConfigError for any other content."""
    return _section_from_json(Config, values, "")


def _section_from_json(section: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the config'} is {type(values).__name__}, expected a JSON object")
    hints = typing.get_type_hints(section)
    if unknown := sorted(set(values) - set(hints)):
        raise ConfigError(f"{prefix}{unknown[0]} is not a field of this version of ddpm_jax")
    arguments = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = _section_from_json(hint, value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    result = section(**arguments)
    check_types(result, prefix)
    return result


def flatten(config: Config) -> dict[str, Any]:
    """The config as one level: {"seed": 0, "data.source": "digits", ...}."""
    flat: dict[str, Any] = {}
    for name, value in to_json(config).items():
        flat.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


def differences(old: Config, new: Config) -> list[str]:
    """Names of the fields in which two configs differ."""
    a, b = flatten(old), flatten(new)
    return [name for name in a if a[name] != b[name]]


def fixed_fields(config: Config) -> dict[str, Any]:
    """The fields that must stay as they are while a run goes on, {"seed": 0, ...}, as JSON values."""
    fixed = {name: value for name, value in flatten(config).items() if name not in MAY_CHANGE}
    return json.loads(json.dumps(fixed))


def changed_fields(recorded: dict[str, Any], config: Config) -> list[str]:
    """Where a config differs from the `fixed_fields` of an earlier one: "name (checkpoint 1, config.json 2)" each.

    Fields that the earlier one did not have yet, had their defaults.
    """
    now = fixed_fields(config)
    was = fixed_fields(Config()) | recorded
    return [
        f"{name} (checkpoint {value!r}, config.json {now.get(name, 'has no such field')!r})"
        for name, value in was.items()
        if name not in MAY_CHANGE and (name not in now or now[name] != value)
    ]
