"""What defines a run: frozen dataclasses with defaults, help, cross-field checks and a JSON round trip.

The text under each field is its help on the command line. The defaults are the paper's CIFAR-10 recipe.
"""

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.options import FRACTION, LAST_SEED, POSITIVE, Bounds, Choices, beside, refusals
from ddpm_jax.diffusion.words import Prediction, Variance

if TYPE_CHECKING:
    from ddpm_jax.diffusion.schedules import Schedule

SCHEDULE = Choices(
    "ddpm_jax.diffusion.schedules:BETAS", "linear", "quad", "const", "jsd", "warmup10", "warmup50", "cosine", "sigmoid"
)
LOSS = Choices("ddpm_jax.diffusion.losses:LOSSES", "simple", "vb", "rescaled_vb", "hybrid", "rescaled_hybrid")
CONDITION = Choices(
    "ddpm_jax.data.conditions:CONDITIONS", "none", "paired", "grey", "downsample2", "downsample4", "downsample8"
)
MOST_VALUE = 2.0**100  # of float32 images: beyond it, as for a range below its inverse, scaling over- or underflows
RANGE = tyro.conf.arg(
    metavar="LOW HIGH",
    help_behavior_hint=lambda value: "(default: 8-bit images)" if value == "None" else f"(default: {value})",
)
WIDTH = Bounds(0.001, 0.288)  # relative, of an average by a power function; a rising one's is below 1/sqrt(12) = 0.2887
LONGEST = 31  # of a tuple: levels that halve an image so often leave nothing

# Marks fields that may change when a run resumes: its length, its speed and its outputs, not what it computes. The source of
# the images may change too, since the data set's identity is compared separately.
MAY_CHANGE = "may change when the run is continued"


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what they become."""

    source: Annotated[str, MAY_CHANGE] = "digits"
    """Where the images come from: a folder or a zip file of pictures, `tfds:NAME[:split]` (see ddpm-jax prepare-data), a file
    `x.npy` or `x.npz` of images or `x.gz` of MNIST's format (IDX), or `digits` (scikit-learn's)."""
    image_size: Annotated[int | tuple[int, int], Bounds(1), tyro.conf.arg(metavar="INT [INT]")] = 32
    """Height and width in pixels that the network sees, one number for both or two; pictures are cropped and resized to it."""
    channels: Annotated[int, Bounds(1)] = 3
    """1 for grey images, 3 for RGB; arrays may have any number."""
    value_range: Annotated[tuple[float, float] | None, RANGE] = None
    """Makes the images float32: the lowest and the highest value, which become -1 and 1 (see docs/data.md)."""
    condition: Annotated[str, CONDITION] = "none"
    """A picture that the network is given beside x_t: computed from each image, or paired with it (see docs/conditions.md)."""
    condition_source: Annotated[str, MAY_CHANGE] = ""
    """Where paired conditions come from: pictures with the images' names, or arrays in their order; empty: the array
    `conditions` of the images' .npz file."""
    condition_channels: Annotated[int, Bounds(0)] = 0
    """Channels of paired conditions; 0: as many as the images'."""
    cache: Annotated[Literal["auto", "device", "host", "none"], MAY_CHANGE] = "auto"
    """Decode pictures once and keep them on the devices or in a file that the host maps; none: decode them at every step.
    auto: device up to 1 GiB, host up to 8 GiB, else none. Changes speed only."""
    workers: Annotated[int, Bounds(0, 1024), MAY_CHANGE] = 0
    """Threads that decode pictures; 0: one for each CPU core. Changes speed only."""
    on_bad_image: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """What a picture that cannot be decoded does: stop the run, or be left out, if ddpm-jax prepare-data --check listed it."""

    def __post_init__(self) -> None:
        """Makes two equal sides one number, so that configs that mean the same are equal."""
        match self.image_size:
            case (height, width) if height == width:
                object.__setattr__(self, "image_size", height)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


@dataclass(frozen=True)
class ModelConfig:
    """The U-Net."""

    ch: Annotated[int, Bounds(4)] = 128
    """Base channels C."""
    ch_mult: Annotated[tuple[int, ...], Bounds(1)] = (1, 2, 2, 2)
    """Channels of each level, in units of ch; each level after the first halves the resolution."""
    num_res_blocks: Annotated[int, Bounds(1, 100)] = 2
    """Residual blocks per level on the way down (one more on the way up)."""
    attn_resolutions: Annotated[tuple[int, ...], Bounds(1)] = (16,)
    """Resolutions, by the shorter side, with self-attention after every block (the middle always has it)."""
    dropout: Annotated[float, FRACTION] = 0.1
    """Probability that a feature is dropped in training."""
    groups: Annotated[int, Bounds(1)] = 32
    """Groups of every group normalisation."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the network computes in; parameters, norm statistics, softmax, output and losses stay float32."""
    num_classes: Annotated[int, Bounds(0, 1_000_000)] = 0
    """Classes of the images, whose labels the network is given; 0: it is given none."""
    remat: Annotated[bool, MAY_CHANGE] = False
    """Recompute every block in the backward pass instead of storing its inside: less memory, about a third more time."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process, what the network predicts, and the loss."""

    T: Annotated[int, Bounds(2, 1_000_000)] = 1000
    """Number of diffusion steps."""
    schedule: Annotated[str, SCHEDULE] = "linear"
    """Variance schedule."""
    beta_start: float = 1e-4
    """First beta (linear, quad, warmup10, warmup50, sigmoid)."""
    beta_end: float = 0.02
    """Last beta (linear, quad, const, warmup10, warmup50, sigmoid)."""
    prediction: Prediction = "eps"
    """What the network's output stands for."""
    variance: Variance = "fixed_large"
    """Variance of p(x_{t-1} | x_t); the learned ones double the output channels."""
    loss: Annotated[str, LOSS] = "simple"
    """L_simple, the variational bound's term, or both (the hybrid ones need a learned variance)."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """Weight of each t in the simple loss."""
    min_snr_gamma: Annotated[float, POSITIVE] = 5.0
    """Where min-SNR weighting clips the signal-to-noise ratio."""
    t_sampler: Literal["uniform", "loss_history"] = "uniform"
    """How t is drawn in training: uniformly, or by importance from the history of losses."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, and what is written on the way."""

    steps: Annotated[int, Bounds(1), MAY_CHANGE] = 800_000
    """Last step; the same command continues up to it, and stops there."""
    batch_size: Annotated[int, Bounds(1)] = 128
    """Images per step, over all devices and processes."""
    accumulation: Annotated[int, Bounds(1), MAY_CHANGE] = 1
    """Parts that a batch's gradient is summed from, one after the other: less memory, same result to rounding."""
    lr: Annotated[float, POSITIVE] = 2e-4
    """Adam's learning rate after the warm-up."""
    warmup_steps: Annotated[int, Bounds(0)] = 5000
    """Steps over which the learning rate rises linearly from 0."""
    adam_b1: Annotated[float, FRACTION] = 0.9
    """Adam's decay of the first moment."""
    adam_b2: Annotated[float, FRACTION] = 0.999
    """Adam's decay of the second moment."""
    adam_eps: Annotated[float, POSITIVE] = 1e-8
    """Adam's epsilon."""
    grad_clip: Annotated[float, POSITIVE] = 1.0
    """Largest global norm of the gradient."""
    ema_decay: Annotated[float, FRACTION] = 0.9999
    """Decay of the exponential moving average of the parameters, which samples are drawn from."""
    ema_warmup: bool = False
    """Lower that decay to (1 + n) / (10 + n) at early steps n, so that a short run's average forgets the initial parameters."""
    ema_decays: Annotated[tuple[float, ...], FRACTION] = ()
    """Decays of further such averages, for `--weights ema:DECAY`; each costs memory like the parameters."""
    ema_widths: Annotated[tuple[float, ...], WIDTH] = ()
    """Relative widths of power-function averages, 0.05 0.1 say, whose snapshots at every save_every give the average of any
    width afterwards, by `--weights width:WIDTH` (docs/training.md)."""
    label_dropout: Annotated[float, FRACTION] = 0.0
    """Probability that an image is trained without its label, as classifier-free guidance needs; 0.1 is usual."""
    flip: bool = True
    """Mirror half of the images, left to right, drawn anew at every step."""
    flip_ud: bool = False
    """Mirror half of the images, top to bottom, drawn anew at every step."""
    turn: bool = False
    """Turn every image by 0, 90, 180 or 270 degrees, drawn anew at every step; square images only."""
    steps_per_dispatch: Annotated[int, Bounds(1), MAY_CHANGE] = 1
    """Steps that run on the devices without the host; divides steps and every interval below."""
    log_every: Annotated[int, Bounds(1), MAY_CHANGE] = 100
    """Steps between two log lines."""
    sample_every: Annotated[int, Bounds(0), MAY_CHANGE] = 10_000
    """Steps between two sample grids; 0: none."""
    num_samples: Annotated[int, Bounds(1), MAY_CHANGE] = 64
    """Images of a sample grid."""
    save_every: Annotated[int, Bounds(1), MAY_CHANGE] = 5000
    """Steps between two checkpoints."""
    keep_last: Annotated[int, Bounds(2), MAY_CHANGE] = 2
    """How many of the newest checkpoints stay, at least 2. If a later command keeps fewer, those that are there stay for good."""
    keep_every: Annotated[int, Bounds(0), MAY_CHANGE] = 0
    """Keep every checkpoint whose step is a multiple of this as well; 0: none. A later command deletes none of those there."""
    eval_every: Annotated[int, Bounds(0), MAY_CHANGE] = 0
    """Steps between two evaluations of the EMA parameters on held-out images, each at a checkpoint; 0: none."""
    eval_source: Annotated[str, MAY_CHANGE] = ""
    """The held-out images, as data.source names them: a test split, say."""
    eval_condition_source: Annotated[str, MAY_CHANGE] = ""
    """Their paired conditions, as data.condition_source names them."""
    eval_images: Annotated[int, Bounds(2), MAY_CHANGE] = 1024
    """How many of them, taken at equal distances, at least 2."""
    eval_samples: Annotated[int, Bounds(0), MAY_CHANGE] = 0
    """Images drawn at each evaluation for the FID against the training images; 0: none."""
    eval_features: Annotated[Literal["inception", "pixels"], MAY_CHANGE] = "inception"
    """What that FID compares images by: Inception-v3, or their bare pixels."""
    keep_best: Annotated[Literal["eval_loss", "eval_bits_per_dim", "eval_fid"], MAY_CHANGE] = "eval_loss"
    """The checkpoint at which this was least is kept too: `--step best`."""
    init_from: str = ""
    """Workdir, pretrained:NAME or exported .safetensors file whose EMA parameters the run starts from; empty: random ones."""
    fsdp: Annotated[int, Bounds(1), MAY_CHANGE] = 1
    """Devices over which parameters, EMA and optimizer state are split, for models too big for one device."""


@dataclass(frozen=True)
class Config:
    """Everything that defines a run except its workdir. The defaults are the paper's CIFAR-10 recipe.

    Example:
        >>> import dataclasses
        >>> from ddpm_jax import Config
        >>> config = Config(seed=1)
        >>> dataclasses.replace(config, train=dataclasses.replace(config.train, steps=100)).train.steps
        100
    """

    seed: Annotated[int, Bounds(0, LAST_SEED)] = 0
    """Seed of every random draw, 0 to 4294967295."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def num_labels(config: Config) -> int:
    """The labels that the network is given: its classes, and with label dropout that of no class, which comes last."""
    return config.model.num_classes + bool(config.train.label_dropout)


OWN_BETAS = ("cosine", "jsd")  # schedules that beta_start and beta_end do not change
MOST_LAST_ALPHA_BAR = 0.01  # of a schedule that ends in noise; the paper's ends at 4e-5


class ConfigError(UsageError):
    """A config that cannot be run."""


def check(config: Config, *, num_devices: int | None = 1, own_network: bool = False) -> list[str]:
    """Refuses a config that cannot run, before anything is compiled. Returns warnings, one sentence each.

    num_devices: devices of all processes; None skips the checks that depend on them. own_network: the network is not the
    U-Net, so config.model is not checked. Raises ConfigError.
    """
    check_types(config)
    _check_numbers(config)
    _check_images(config)
    if not own_network:
        _check_network(config)
    if config.train.label_dropout and not config.model.num_classes:
        raise ConfigError(
            f"train.label_dropout={config.train.label_dropout} needs classes; set model.num_classes, or leave it at 0"
        )
    schedule = _check_diffusion(config.diffusion)
    _check_averages(config.train)
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
    return warnings + _without_effect(config)


def _without_effect(config: Config) -> list[str]:
    """The warnings for options that were changed and that no other option makes use of."""
    values, usual, diffusion = flatten(config), flatten(Config()), config.diffusion
    evaluated = ("eval_source", "eval_condition_source", "eval_images", "eval_samples", "eval_features", "keep_best")
    unused = {}
    if not config.train.eval_every:
        why = "of evaluations, and train.eval_every=0 makes none; set it as well"
        unused[why] = [f"train.{name}" for name in evaluated]
    # The configs shipped have the paper's betas, scaled to their T, which another schedule may be set beside.
    if diffusion.schedule in OWN_BETAS and not np.allclose(
        (diffusion.beta_start, diffusion.beta_end), _papers_betas(diffusion.T)
    ):
        unused[f"not used by diffusion.schedule={diffusion.schedule}"] = ["diffusion.beta_start", "diffusion.beta_end"]
    if diffusion.loss_weighting != "min_snr":
        unused[f"not used by diffusion.loss_weighting={diffusion.loss_weighting}"] = ["diffusion.min_snr_gamma"]
    changed = {why: [name for name in names if values[name] != usual[name]] for why, names in unused.items()}
    return [
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {why}" for why, names in changed.items() if names
    ]


def _papers_betas(T: int) -> tuple[float, float]:
    """The first and the last of the paper's betas, 1e-4 and 0.02 of T = 1000, for another T."""
    return 1e-4 * 1000 / T, 0.02 * 1000 / T


def _ends_early(diffusion: DiffusionConfig, last: float) -> str:
    """The warning for a schedule whose last alpha-bar is far from 0."""
    from ddpm_jax.diffusion.schedules import make_schedule  # it imports JAX

    remedies = ["diffusion.schedule=cosine"]
    if diffusion.schedule not in OWN_BETAS:
        start, end = _papers_betas(diffusion.T)
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
    """Refuses values of the wrong type, or outside of a field's choices. Raises ConfigError.

    prefix: of the section's field names.
    """
    hints = typing.get_type_hints(type(section), include_extras=True)
    for f in dataclasses.fields(section):
        value, hint, name = getattr(section, f.name), _type_of(hints[f.name]), prefix + f.name
        if not _matches(value, hint):
            raise ConfigError(f"{name}={value!r} is not {_describe(hint)}")
        if dataclasses.is_dataclass(value):
            check_types(value, name + ".")


def _type_of(hint: Any) -> Any:
    """A field's bare type; its choices, where it has some."""
    choices = [mark for mark in beside(hint) if isinstance(mark, Choices)]
    if choices:
        return choices[0]
    return typing.get_args(hint)[0] if beside(hint) else hint


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a type that lists them, else none."""
    if isinstance(hint, Choices):
        return hint.choices
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _matches(value: Any, hint: Any) -> bool:
    if choices := _choices(hint):
        return any(value == choice and type(value) is type(choice) for choice in choices)  # True is not 1
    if typing.get_origin(hint) is types.UnionType:
        return any(_matches(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kind, *others = typing.get_args(hint)
        if not isinstance(value, tuple) or (others != [...] and len(value) != 1 + len(others)):
            return False
        return all(_matches(v, kind) for v in value)
    if hint is float:
        if isinstance(value, int) and abs(value) > sys.float_info.max:
            return False
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if choices := _choices(hint):
        return "one of " + ", ".join(map(str, choices))
    if typing.get_origin(hint) is types.UnionType:
        return " or ".join(map(_describe, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        kind, *others = typing.get_args(hint)
        count = "" if others == [...] else f"{1 + len(others)} "
        return f"a tuple of {count}{'whole ' if kind is int else ''}numbers"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "None"}
    return names.get(hint, f"a {hint.__name__}")


def fields_of(section: type = Config, prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every field of a config: its full name and marks (`Bounds`, `Choices`, `MAY_CHANGE`)."""
    for name, hint in typing.get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from fields_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name, beside(hint)


def changeable() -> frozenset[str]:
    """The names of the fields that may change when a run resumes."""
    return frozenset(name for name, marks in fields_of() if MAY_CHANGE in marks)


def _check_numbers(config: Config) -> None:
    values = flatten(config)
    for name, marks in fields_of():
        value = values[name]
        if isinstance(value, tuple) and len(value) > LONGEST:
            raise ConfigError(f"{name} has {len(value)} numbers, which are too many; use {LONGEST} or fewer")
        for number, refusal in refusals(value, marks):
            raise ConfigError(f"{name}={number} {refusal}")


def _check_images(config: Config) -> None:
    data, train = config.data, config.train
    if train.turn and len(set(data.size)) > 1:
        raise ConfigError(
            f"train.turn=True turns images by 90 degrees, which needs a square, got data.image_size={data.image_size}; "
            "leave it out, or use one size for both sides"
        )
    of_pairs = {
        "data.condition_source": data.condition_source,
        "data.condition_channels": data.condition_channels,
        "train.eval_condition_source": train.eval_condition_source,
    }
    for name, value in of_pairs.items():
        if value and data.condition != "paired":
            raise ConfigError(
                f"{name}={value} is of paired conditions, got data.condition={data.condition}; leave it out, or set "
                "data.condition=paired"
            )
    if data.value_range is None:
        return
    low, high = data.value_range
    within = low >= -MOST_VALUE and high <= MOST_VALUE and high - low >= 1 / MOST_VALUE
    if not within or np.float32(low) == np.float32(high):
        raise ConfigError(
            f"data.value_range={data.value_range} is no range of float32; give the lowest value, then the highest"
        )
    if config.diffusion.loss in ("vb", "rescaled_vb"):
        raise ConfigError(
            f"diffusion.loss={config.diffusion.loss} is the bits/dim of 8-bit images, and data.value_range makes them float32; "
            "use simple, or a hybrid loss with a learned variance"
        )
    if train.eval_every and train.keep_best == "eval_bits_per_dim":
        raise ConfigError(
            "train.keep_best=eval_bits_per_dim is of 8-bit images, and data.value_range makes them float32; use eval_loss"
        )


def _check_network(config: Config) -> None:
    model, sides = config.model, config.data.size
    for name, values in [("model.ch_mult", model.ch_mult), ("model.attn_resolutions", model.attn_resolutions)]:
        if not values:
            raise ConfigError(f"{name} is empty; give at least one number")
    halvings = len(model.ch_mult) - 1
    if any(side % 2**halvings for side in sides):
        raise ConfigError(
            f"data.image_size={config.data.image_size} cannot be halved {halvings} times, as the {halvings + 1} levels of "
            f"model.ch_mult={model.ch_mult} ask; use a multiple of {2**halvings}"
        )
    resolutions = [min(sides) // 2**i for i in range(halvings + 1)]
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


def _check_diffusion(diffusion: DiffusionConfig) -> "Schedule":
    from ddpm_jax.diffusion.schedules import make_schedule  # it imports JAX

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
            f"whose last alphas_cumprod is {last:g}, so x_0 cannot be computed from it; use x_0 or x_prev"
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


def _check_averages(train: TrainConfig) -> None:
    for name in ("ema_decays", "ema_widths"):
        values = getattr(train, name)
        if len(set(values)) < len(values):
            raise ConfigError(f"train.{name}={values} has a number twice; give each once")
    if len(train.ema_widths) == 1:
        raise ConfigError(
            f"train.ema_widths={train.ema_widths} is one width, and others are rebuilt from two; add one, such as "
            f"{0.1 if train.ema_widths[0] < 0.1 else 0.05}"
        )


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
    """The inverse of `to_json`; missing fields take their defaults. Raises ConfigError for any other content."""
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


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, {"train.lr": (old, new), ...}."""
    a, b = flatten(old), flatten(new)
    return {name: (a[name], b[name]) for name in a if a[name] != b[name]}


def fixed_fields(config: Config) -> dict[str, Any]:
    """The fields that may not change when a run resumes, {"seed": 0, ...}, as JSON values."""
    fixed = {name: value for name, value in flatten(config).items() if name not in changeable()}
    return json.loads(json.dumps(fixed))


def changed_fields(recorded: dict[str, Any], config: Config) -> list[str]:
    """The fixed fields in which a config differs from recorded ones, each as "name (checkpoint 1, config.json 2)".

    A field that was not recorded counts as its default.
    """
    now = fixed_fields(config)
    was = fixed_fields(Config()) | recorded
    return [
        f"{name} (checkpoint {value!r}, config.json {now.get(name, 'has no such field')!r})"
        for name, value in was.items()
        if name not in changeable() and (name not in now or now[name] != value)
    ]
