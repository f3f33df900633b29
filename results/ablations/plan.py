"""What is varied, how it is measured, and the commands that say so. Nothing here imports JAX."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from etils import epath

from ddpm_jax.commands.config_file import command_of
from ddpm_jax.config import Config
from ddpm_jax.evaluation.options import Options as Amount
from ddpm_jax.generation.options import SamplerOptions

RUNS = "runs/ablations"

# ---- What is varied


class Variant(NamedTuple):
    """What differs from the baseline: fields of the config by its parts, or the sampler alone.

    parameters_of: the variant whose parameters it has, as its own training would give the same ones.
    """

    changes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    sampler: SamplerOptions = SamplerOptions()
    parameters_of: str = ""


class Group(NamedTuple):
    """Variants that are compared with each other, by what they are called there."""

    title: str
    variants: Mapping[str, str]


def betas(T: int) -> dict[str, Any]:
    """The paper's betas, 1e-4 to 0.02 of T = 1000, for another T: as many times larger as the steps are fewer."""
    return {"T": T, "beta_start": 0.1 / T, "beta_end": 20 / T}


EVALUATIONS = (5, 10, 20, 50)  # of the network, at most, by each sampler
SAMPLERS = {"ancestral": 1, "ddim": 1, "dpm++2m": 1, "dpm++3m": 1, "heun": 2}  # evaluations a step; dpm++1s is ddim
SAMPLING = {
    f"{name}-{most}": Variant(
        sampler=SamplerOptions(sampler=name, steps=((most + each - 1) // each,)), parameters_of="baseline"
    )
    for name, each in SAMPLERS.items()
    for most in EVALUATIONS
}
IMAGES_SEEN = 64_000  # of training, by every variant
VARIANTS = {
    "baseline": Variant(),
    "mean": Variant({"diffusion": {"prediction": "x_prev"}}),
    "x_0": Variant({"diffusion": {"prediction": "x_0"}}),
    "v": Variant({"diffusion": {"prediction": "v"}}),
    "mean_L": Variant({"diffusion": {"prediction": "x_prev", "loss": "vb"}}),
    "eps_L": Variant({"diffusion": {"loss": "vb"}}),
    # L_simple knows no variance
    "fixed_large": Variant({"diffusion": {"variance": "fixed_large"}}, parameters_of="baseline"),
    "learned_range": Variant({"diffusion": {"variance": "learned_range", "loss": "rescaled_hybrid"}}),
    "cosine": Variant({"diffusion": {"schedule": "cosine"}}),
    **{f"T_{T}": Variant({"diffusion": betas(T)}) for T in (50, 200, 1000)},
    **SAMPLING,
    **{f"lr_{lr:g}": Variant({"train": {"lr": lr}}) for lr in (3e-4, 1e-3, 1e-2)},
    **{f"batch_{size}": Variant({"train": {"batch_size": size, "steps": IMAGES_SEEN // size}}) for size in (16, 256)},
    **{f"ema_{decay:g}": Variant({"train": {"ema_decay": decay}}) for decay in (0.0, 0.9, 0.999)},
    **{f"ch_{ch}": Variant({"model": {"ch": ch}}) for ch in (16, 64)},
    "dropout": Variant({"model": {"dropout": 0.1}}),
}
GROUPS = {
    "prediction": Group(
        "What the network predicts, by L_simple", {"eps": "baseline", "mean": "mean", "x_0": "x_0", "v": "v"}
    ),
    "loss": Group(
        "Table 2: prediction and loss",
        {"mean, L": "mean_L", "mean, squared error": "mean", "eps, L": "eps_L", "eps, L_simple": "baseline"},
    ),
    "variance": Group(
        "The variance of p(x_{t-1} | x_t)",
        {"fixed_small": "baseline", "fixed_large": "fixed_large", "learned_range, L_hybrid": "learned_range"},
    ),
    "schedule": Group("The schedule", {"linear": "baseline", "cosine": "cosine"}),
    "T": Group("The number of diffusion steps", {"50": "T_50", "100": "baseline", "200": "T_200", "1000": "T_1000"}),
    "samplers": Group(
        "Samplers, by network evaluations",
        {key.replace("-", ", "): key for key in SAMPLING} | {"ancestral, all": "baseline"},
    ),
    "lr": Group("The learning rate", {"3e-4": "lr_0.0003", "1e-3": "lr_0.001", "3e-3": "baseline", "1e-2": "lr_0.01"}),
    "batch": Group("The batch size", {"16": "batch_16", "64": "baseline", "256": "batch_256"}),
    "ema": Group("The decay of the EMA", {"raw": "ema_0", "0.9": "ema_0.9", "0.99": "baseline", "0.999": "ema_0.999"}),
    "network": Group(
        "The network",
        {"ch = 16": "ch_16", "ch = 32": "baseline", "ch = 64": "ch_64", "ch = 32, dropout 0.1": "dropout"},
    ),
}


def plan(only: Iterable[str], seeds: int) -> list[tuple[str, int]]:
    """The runs of some groups, or of all: variants and seeds. One seed's come first, so that the tables can be made early."""
    keys = dict.fromkeys(key for name in tuple(only) or GROUPS for key in GROUPS[name].variants.values())
    return [(key, seed) for seed in range(seeds) for key in keys]


def config_of(base: Config, key: str, seed: int) -> Config:
    """The config of a run. Its training draws no samples, which evaluation does."""
    config = dataclasses.replace(base, seed=seed, train=dataclasses.replace(base.train, sample_every=0))
    parts = {
        part: dataclasses.replace(getattr(config, part), **fields) for part, fields in VARIANTS[key].changes.items()
    }
    return dataclasses.replace(config, **parts)


# ---- How it is measured

IMAGES = 512  # as many as the digits' own judge takes
REAL, MOST_TERMS = 256, 333  # images of which bits/dim are computed; terms of the bound of each


def measurements(key: str, T: int) -> list[tuple[tuple[str, ...], Amount]]:
    """Metrics, and how much is computed for them; of a sampler only what depends on it."""
    of_samples = ("fid", "prdc"), Amount(num_images=IMAGES)
    of_network = ("losses", "nll"), Amount(num_real=REAL, terms=min(T - 1, MOST_TERMS))
    return [of_samples] if key in SAMPLING else [of_network, of_samples]


def words(options: Any) -> list[str]:
    """The command line of the options that are not their defaults."""
    said: list[str] = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            said += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return said


def workdir_of(key: str, seed: int) -> epath.Path:
    """The workdir of a run."""
    return epath.Path(RUNS) / key / f"seed_{seed}"


def row_file(key: str, seed: int) -> epath.Path:
    """The file of a run's row (`measure.carry_out`)."""
    return workdir_of(key, seed).with_suffix(".json")


def commands(base: Config, key: str, seed: int) -> list[str]:
    """The commands that do the same as `carry_out`."""
    config, variant = config_of(base, key, seed), VARIANTS[key]
    workdir = str(workdir_of("baseline" if key in SAMPLING else key, seed))
    evaluated = [
        [*metrics, *words(amount), *words(variant.sampler)] for metrics, amount in measurements(key, config.diffusion.T)
    ]
    evaluate = ["ddpm-jax", "evaluate", workdir, "--features", "pixels", "--no-figures", "--metrics"]
    return [command_of(config, workdir), *(shlex.join([*evaluate, *each]) for each in evaluated)]
