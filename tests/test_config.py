"""What a config refuses, before anything is compiled; its JSON round trip."""

import ast
import dataclasses
import inspect
import json
import math
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, experiment, tiny

from ddpm_jax import config as configs
from ddpm_jax.config import (
    Config,
    ConfigError,
    changeable,
    changed_fields,
    check,
    differences,
    fixed_fields,
    flatten,
    from_json,
    to_json,
)
from ddpm_jax.core.errors import UsageError
from ddpm_jax.diffusion.process import Process, predict_x_0
from ddpm_jax.training.step import init_state

SECTIONS = ("data", "model", "diffusion", "train")

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)


def replaced(config, name, value):
    """The config with one field, named as in `flatten`, changed."""
    section, _, field = name.rpartition(".")
    if section:
        field, value = section, dataclasses.replace(getattr(config, section), **{field: value})
    return dataclasses.replace(config, **{field: value})


def refuses(message):
    return pytest.raises(ConfigError, match=f"^{re.escape(message)}$")


# ---- Mistakes, each with what is said about it

MISTAKES = {
    "train.batch_size=100 is not divisible by the 8 devices; use 96 or 104": {
        "devices": 8,
        "train": {"batch_size": 100},
    },
    "train.batch_size=6 is not divisible by the 8 devices; use 8": {"devices": 8, "train": {"batch_size": 6}},
    "train.batch_size=40 is not divisible by the 4 devices times train.accumulation=3; use 36 or 48": {
        "devices": 4,
        "train": {"batch_size": 40, "accumulation": 3},
    },
    "train.batch_size=16 is not divisible by train.accumulation=5; use 15 or 20": {"train": {"accumulation": 5}},
    "train.fsdp=3 does not divide the 8 devices; choose a divisor": {"devices": 8, "train": {"fsdp": 3}},
    "data.image_size=30 cannot be halved 3 times, as the 4 levels of model.ch_mult=(1, 2, 2, 2) ask; use "
    "a multiple of 8": {"data": {"image_size": 30}, "model": {"ch_mult": (1, 2, 2, 2)}},
    "model.attn_resolutions has 16, but the network's resolutions are 8, 4; choose among these": {
        "model": {"attn_resolutions": (4, 16)}
    },
    "model.groups=16 does not divide model.ch=8; change one of them": {
        "model": {"ch_mult": (2, 4), "ch": 8, "groups": 16}
    },
    "model.ch=9 is odd, but the time embedding has two halves; use an even number": {"model": {"ch": 9}},
    "model.ch_mult is empty; give at least one number": {"model": {"ch_mult": ()}},
    "model.attn_resolutions is empty; give at least one number": {"model": {"attn_resolutions": ()}},
    "model.ch_mult=0 is too small; use 1 or more": {"model": {"ch_mult": (1, 0)}},
    "data.channels=0 is too small; use 1 or more": {"data": {"channels": 0}},
    "data.image_size=(8, 9) cannot be halved 1 times, as the 2 levels of model.ch_mult=(1, 2) ask; use a multiple of 2": {
        "data": {"image_size": (8, 9)}
    },
    "model.attn_resolutions has 8, but the network's resolutions are 6, 3; choose among these": {
        "data": {"image_size": (6, 8)},
        "model": {"attn_resolutions": (8,)},
    },
    "train.turn=True turns images by 90 degrees, which needs a square, got data.image_size=(8, 12); leave it out, or use one "
    "size for both sides": {"data": {"image_size": (8, 12)}, "train": {"turn": True}},
    **{
        f"data.value_range={given} is no range of float32; give the lowest value, then the highest": {
            "data": {"value_range": given}
        }
        for given in ((1.0, 0.0), (2, 2), (0.0, math.inf), (math.nan, 1.0), (0.0, 1e39), (1.0, 1.0 + 1e-12), (0, 1e-31))
    },
    "diffusion.loss=vb is the bits/dim of 8-bit images, and data.value_range makes them float32; use simple, or a hybrid loss "
    "with a learned variance": {"data": {"value_range": (0, 1)}, "diffusion": {"loss": "vb"}},
    "train.keep_best=eval_bits_per_dim is of 8-bit images, and data.value_range makes them float32; use eval_loss": {
        "data": {"value_range": (0, 1)},
        "train": {"eval_every": 10, "eval_source": "digits", "keep_best": "eval_bits_per_dim"},
    },
    "diffusion.T=1 is too small; use 2 or more": {"diffusion": {"T": 1}},
    "diffusion: got beta_start = 0, expected above 0 and at most 1": {"diffusion": {"beta_start": 0.0}},
    "diffusion: got beta_start = nan, expected above 0 and at most 1": {"diffusion": {"beta_start": math.nan}},
    "diffusion: got beta_end = 1.5, expected above 0 and at most 1": {"diffusion": {"beta_end": 1.5}},
    "diffusion.prediction=eps cannot be used with diffusion.schedule=jsd, whose last alphas_cumprod is "
    "0, so x_0 cannot be computed from it; use x_0 or x_prev": {"diffusion": {"schedule": "jsd"}},
    "diffusion.prediction=v cannot be used with diffusion.schedule=jsd, whose last alphas_cumprod is 0, "
    "so x_0 cannot be computed from it; use x_0 or x_prev": {"diffusion": {"schedule": "jsd", "prediction": "v"}},
    "diffusion.prediction=eps cannot be used with diffusion.schedule=linear, whose last alphas_cumprod "
    "is 0, so x_0 cannot be computed from it; use x_0 or x_prev": {"diffusion": {"beta_end": 1.0}},
    "diffusion.prediction=eps cannot be used with diffusion.schedule=const, whose last alphas_cumprod is "
    "9.33264e-302, so x_0 cannot be computed from it; use x_0 or x_prev": {
        "diffusion": {"schedule": "const", "T": 1000}
    },
    "diffusion.variance=learned is never trained by diffusion.loss=simple; use loss vb, hybrid or "
    "rescaled_hybrid, or a fixed variance": {"diffusion": {"variance": "learned"}},
    "diffusion.loss=hybrid needs a learned variance, got diffusion.variance=fixed_large; use learned or "
    "learned_range": {"diffusion": {"loss": "hybrid"}},
    "diffusion.loss=rescaled_hybrid needs a learned variance, got diffusion.variance=fixed_small; use "
    "learned or learned_range": {"diffusion": {"loss": "rescaled_hybrid", "variance": "fixed_small"}},
    "diffusion.loss_weighting=min_snr is defined for diffusion.loss=simple with prediction eps, x_0 or "
    "v, got loss vb and prediction eps": {"diffusion": {"loss_weighting": "min_snr", "loss": "vb"}},
    "diffusion.loss_weighting=min_snr is defined for diffusion.loss=simple with prediction eps, x_0 or "
    "v, got loss simple and prediction x_prev": {"diffusion": {"loss_weighting": "min_snr", "prediction": "x_prev"}},
    **{
        f"train.{name}=15 is not a multiple of train.steps_per_dispatch=2; change one of them": {"train": {name: 15}}
        for name in ("steps", "log_every", "sample_every", "save_every")
    },
    "train.keep_every=15 is not a multiple of train.save_every=10, so no such checkpoint would be "
    "written; change one of them": {"train": {"keep_every": 15}},
    "train.eval_every=15 is not a multiple of train.save_every=10, so no such checkpoint would be "
    "written; change one of them": {"train": {"eval_every": 15, "eval_source": "digits"}},
    "train.eval_every=10 has no held-out images; name them with train.eval_source": {"train": {"eval_every": 10}},
    "train.keep_best=eval_fid needs samples to take the FID of; set train.eval_samples": {
        "train": {"eval_every": 10, "eval_source": "digits", "keep_best": "eval_fid"}
    },
    "train.eval_samples=1 has no covariance; use 2 or more, or 0 for none": {"train": {"eval_samples": 1}},
    "diffusion.T=10000000000 is too large; use 1000000 or less": {"diffusion": {"T": 10**10}},
    "model.num_res_blocks=100000000 is too large; use 100 or less": {"model": {"num_res_blocks": 10**8}},
    "model.ch_mult has 1000000 numbers, which are too many; use 31 or fewer": {"model": {"ch_mult": (1,) * 10**6}},
    "model.ch_mult=10000000000 is too large; use 2147483647 or less": {"model": {"ch_mult": (1, 10**10)}},
    "model.attn_resolutions has 1000000 numbers, which are too many; use 31 or fewer": {
        "model": {"attn_resolutions": (4,) * 10**6}
    },
    "data.workers=1000000000 is too large; use 1024 or less": {"data": {"workers": 10**9}},
    **{
        f"{section}.{name}=10000000000 is too large; use 2147483647 or less": {section: {name: 10**10}}
        for section, names in {
            "data": ("image_size",),
            "model": ("ch",),
            "train": (
                "steps",
                "warmup_steps",
                "steps_per_dispatch",
                "batch_size",
                "num_samples",
                "eval_images",
                "eval_samples",
            ),
        }.items()
        for name in names
    },
    "train.keep_last=1 is too small; use 2 or more": {"train": {"keep_last": 1}},
    "train.steps=0 is too small; use 1 or more": {"train": {"steps": 0}},
    "train.steps_per_dispatch=0 is too small; use 1 or more": {"train": {"steps_per_dispatch": 0}},
    "train.accumulation=0 is too small; use 1 or more": {"train": {"accumulation": 0}},
    "train.fsdp=0 is too small; use 1 or more": {"train": {"fsdp": 0}},
    "train.warmup_steps=-1 is too small; use 0 or more": {"train": {"warmup_steps": -1}},
    "model.ch=2 is too small; use 4 or more": {"model": {"ch": 2}},
    "model.groups=0 is too small; use 1 or more": {"model": {"groups": 0}},
    "data.image_size=0 is too small; use 1 or more": {"data": {"image_size": 0}},
    "model.dropout=1.0 is outside of [0, 1); choose a value inside": {"model": {"dropout": 1.0}},
    "model.dropout=nan is outside of [0, 1); choose a value inside": {"model": {"dropout": math.nan}},
    "train.ema_decay=1.0 is outside of [0, 1); choose a value inside": {"train": {"ema_decay": 1.0}},
    "train.ema_decays=1.0 is outside of [0, 1); choose a value inside": {"train": {"ema_decays": (0.9, 1.0)}},
    "train.ema_decays=(0.9, 0.9) has a number twice; give each once": {"train": {"ema_decays": (0.9, 0.9)}},
    "train.ema_widths=0.289 is too large; use 0.288 or less": {"train": {"ema_widths": (0.05, 0.289)}},
    "train.ema_widths=0 is too small; use 0.001 or more": {"train": {"ema_widths": (0, 0.1)}},
    "train.ema_widths=(0.1, 0.1) has a number twice; give each once": {"train": {"ema_widths": (0.1, 0.1)}},
    "train.ema_widths=(0.05,) is one width, and others are rebuilt from two; add one, such as 0.1": {
        "train": {"ema_widths": (0.05,)}
    },
    "train.ema_widths=(0.1,) is one width, and others are rebuilt from two; add one, such as 0.05": {
        "train": {"ema_widths": (0.1,)}
    },
    "train.lr=0.0 is not a positive number": {"train": {"lr": 0.0}},
    "train.lr=nan is not a positive number": {"train": {"lr": math.nan}},
    "train.grad_clip=inf is not a positive number": {"train": {"grad_clip": math.inf}},
    "seed=4294967296 is too large; use 4294967295 or less": {"seed": 2**32},
    "seed=-1 is too small; use 0 or more": {"seed": -1},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistake_is_refused_before_any_compile(message):
    changes = dict(MISTAKES[message])
    num_devices = changes.pop("devices", 1)
    config = tiny(**changes)
    before = len(compiled)
    with refuses(message):
        check(config, num_devices=num_devices)
    assert len(compiled) == before
    assert "\n" not in message
    assert issubclass(ConfigError, UsageError)  # exit code 2


def test_a_compile_would_have_been_noticed():
    before = len(compiled)
    jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
    assert len(compiled) > before


@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_right_config_passes_without_a_warning(num_devices):
    assert check(TINY, num_devices=num_devices) == []


PAPER = {"beta_start": 1e-4, "beta_end": 0.02}


@pytest.mark.parametrize(
    "changes",
    [
        {"diffusion": {"variance": "learned_range", "loss": "hybrid"}},
        {"diffusion": {"variance": "learned", "loss": "vb"}},
        {"diffusion": {"variance": "learned", "loss": "rescaled_hybrid"}},
        {"diffusion": PAPER | {"schedule": "jsd", "prediction": "x_0"}},
        {"diffusion": PAPER | {"schedule": "jsd", "prediction": "x_prev"}},
        {"diffusion": {"loss_weighting": "min_snr", "prediction": "v"}},
        {"diffusion": PAPER | {"T": 2, "schedule": "cosine"}},
        {"diffusion": {"T": 100, "schedule": "cosine", "beta_start": 1e-3, "beta_end": 0.2}},  # as in configs/digits.py
        {"diffusion": {"loss_weighting": "min_snr", "min_snr_gamma": 3.0}},
        {"train": {"eval_every": 10, "eval_source": "x", "eval_samples": 8, "keep_best": "eval_fid"}},
        {"train": {"keep_every": 20}},
        {"model": {"dropout": 0.0, "attn_resolutions": (8, 4)}},
        {"seed": 2**32 - 1},
    ],
)
def test_what_is_not_a_mistake_passes(changes):
    assert check(tiny(**changes)) == []


def test_warm_up_longer_than_the_run_is_a_warning():
    assert check(tiny(train={"warmup_steps": 40})) == []
    assert check(tiny(train={"warmup_steps": 41})) == [
        "train.warmup_steps=41 is longer than the run of 40 steps, so the learning rate never reaches train.lr"
    ]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"train": {"eval_source": "x", "keep_best": "eval_fid"}},
            "train.eval_source and train.keep_best are of evaluations, and train.eval_every=0 makes none; set it as well",
        ),
        (
            {"diffusion": PAPER | {"schedule": "cosine", "beta_end": 0.3}},
            "diffusion.beta_end is not used by diffusion.schedule=cosine",
        ),
        (
            {"diffusion": {"schedule": "jsd", "prediction": "x_0"}},
            "diffusion.beta_start and diffusion.beta_end are not used by diffusion.schedule=jsd",
        ),
        ({"diffusion": {"min_snr_gamma": 3.0}}, "diffusion.min_snr_gamma is not used by diffusion.loss_weighting=none"),
    ],
)
def test_an_option_without_effect_is_a_warning(changes, warning):
    assert check(tiny(**changes)) == [warning]


def passes_without_a_warning(diffusion, start=0.0001, end=0.02):
    return check(tiny(diffusion=diffusion | {"beta_start": start, "beta_end": end})) == []


@pytest.mark.parametrize("schedule", ["linear", "quad", "const", "warmup50", "sigmoid"])
def test_a_schedule_that_ends_in_an_image_is_a_warning_whose_remedy_holds(schedule):
    """At T=100 the paper's betas keep 0.60 of the image in x_T."""
    short = {"schedule": schedule, "T": 100}
    (warning,) = check(tiny(diffusion=short | {"beta_start": 0.0001, "beta_end": 0.02}))
    assert f"{schedule} schedule of diffusion.T=100" in warning
    if schedule == "linear":
        assert "x_T keeps 0.60 of the image" in warning
    assert "use diffusion.schedule=cosine" in warning
    assert passes_without_a_warning(short | {"schedule": "cosine"})
    scaled = re.search(r"diffusion.beta_start=(.*) with diffusion.beta_end=(.*)$", warning)
    assert scaled or schedule == "quad"  # scaled too, it ends at 0.08
    if scaled:
        assert passes_without_a_warning(short, *map(float, scaled.groups()))


@pytest.mark.parametrize(("end", "warned"), [(0.045, True), (0.047, False)])  # alpha-bar 0.010014 and 0.0081
def test_the_warning_begins_where_the_last_alpha_bar_is_a_hundredth(end, warned):
    assert passes_without_a_warning({"schedule": "const", "T": 100}, end=end) is not warned


@pytest.mark.parametrize("num_devices", [1, 3, 8])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_proposed_batch_sizes_are_the_nearest_that_pass(num_devices, accumulation):
    def passes(batch_size):
        check(tiny(train={"batch_size": batch_size, "accumulation": accumulation}), num_devices=num_devices)

    for batch_size in range(1, 70):
        try:
            passes(batch_size)
        except ConfigError as error:
            proposed = [int(number) for number in re.search("use (.*)$", str(error)).group(1).split(" or ")]
            for number in proposed:
                passes(number)
            assert max(abs(number - batch_size) for number in proposed) < num_devices * accumulation
            assert max(proposed) > batch_size


@pytest.mark.parametrize("T", [255, 256])
def test_eps_is_allowed_just_where_x_0_is_finite_in_float32(T):
    config = tiny(diffusion={"schedule": "const", "beta_end": 0.5, "T": T})  # 1 / sqrt(alphas_cumprod) = 2 ** (T / 2)
    if T == 256:
        with pytest.raises(ConfigError, match=r"whose last alphas_cumprod is 8\.63617e-78,"):
            check(config)
    else:
        check(config)
        x_t, t = jnp.full((1, 1, 1, 1), 0.5), jnp.array([T - 1])
        assert jnp.isfinite(predict_x_0(Process(experiment(config).process.schedule), x_t, x_t, t)).all()


@pytest.mark.parametrize(
    ("ch", "ch_mult", "groups"),
    [(8, (1,), 8), (8, (1,), 16), (8, (2,), 16), (8, (2, 3), 8), (12, (1, 2), 8), (12, (1, 2), 6), (8, (3, 1), 4)],
)
def test_network_builds_just_where_the_groups_pass(ch, ch_mult, groups):
    config = tiny(model={"ch": ch, "ch_mult": ch_mult, "groups": groups, "attn_resolutions": (8,)})
    try:
        jax.eval_shape(lambda: init_state(experiment(config), jax.random.key(0)))
    except (TypeError, ValueError):
        with pytest.raises(ConfigError, match=f"^model.groups={groups} does not divide"):
            check(config)
    else:
        assert check(config) == []


# ---- Types

CHANNELS = "a tuple of whole numbers"
WRONG_TYPES = [
    ("seed", 1.0, "a whole number"),
    ("seed", True, "a whole number"),
    ("train.steps", 10.0, "a whole number"),
    ("train.steps", "10", "a whole number"),
    ("train.steps", True, "a whole number"),
    ("train.steps", None, "a whole number"),
    ("train.steps", np.int64(10), "a whole number"),  # JSON could not write it
    ("train.lr", "2e-4", "a number"),
    ("train.lr", None, "a number"),
    ("model.dropout", False, "a number"),
    ("train.flip", 1, "true or false"),
    ("train.flip", "no", "true or false"),
    ("data.source", None, "a text"),
    ("data.source", 3, "a text"),
    ("model.ch_mult", [1, 2], CHANNELS),
    ("model.ch_mult", (1, 2.0), CHANNELS),
    ("model.ch_mult", (True, 2), CHANNELS),
    ("model.ch_mult", 1, CHANNELS),
    ("model.ch_mult", "12", CHANNELS),
    ("data.image_size", (8, 8, 8), "a whole number or a tuple of 2 whole numbers"),
    ("data.image_size", (8.0, 12), "a whole number or a tuple of 2 whole numbers"),
    ("data.image_size", None, "a whole number or a tuple of 2 whole numbers"),
    ("data.value_range", (1.0,), "a tuple of 2 numbers or None"),
    ("data.value_range", 255, "a tuple of 2 numbers or None"),
    ("data.cache", "gpu", "one of auto, device, host, none"),
    ("model.dtype", "float16", "one of float32, bfloat16"),
    ("diffusion.prediction", "noise", "one of eps, x_0, x_prev, v"),
    ("diffusion.schedule", ("linear",), "one of linear, quad, const, jsd, warmup10, warmup50, cosine, sigmoid"),
    ("train", {}, "a TrainConfig"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG_TYPES)
def test_wrong_type_is_refused(name, value, expected):
    with refuses(f"{name}={value!r} is not {expected}"):
        check(replaced(TINY, name, value))


def test_whole_number_is_a_number():
    config = replaced(TINY, "train.grad_clip", 1)
    assert check(config) == []
    assert differences(config, replaced(TINY, "train.grad_clip", 1.0)) == {}
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_every_type_is_known_to_the_check():
    for section in (Config, *(type(getattr(TINY, name)) for name in SECTIONS)):
        for name, hint in typing.get_type_hints(section).items():
            default = getattr(section(), name)
            assert configs._matches(default, hint), name
            assert not configs._matches(object(), hint), name


# ---- JSON, differences, help


def other_value(name, value, hint):
    """A value of the field's type that is not the given one."""
    choices = [mark.choices for mark in typing.get_args(hint) if isinstance(mark, configs.Choices)]
    if choices:
        return next(choice for choice in choices[0] if choice != value)
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    if value is None:
        return (0.25, 0.75)
    return {int: 7, float: 0.375, str: "other", tuple: (5, 6)}[type(value)]


def hints():
    """The type of every field, named as in `flatten`."""
    return {
        f"{section}.{name}": hint
        for section in SECTIONS
        for name, hint in typing.get_type_hints(type(getattr(TINY, section)), include_extras=True).items()
    } | {"seed": int}


def test_every_field_survives_json():
    config = TINY
    for name, value in flatten(TINY).items():
        config = replaced(config, name, other_value(name, value, hints()[name]))
    assert list(differences(TINY, config)) == list(flatten(TINY))
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert again == config
    assert {k: type(v) for k, v in flatten(again).items()} == {k: type(v) for k, v in flatten(config).items()}


def test_differences_names_the_one_field_that_differs():
    for name, value in flatten(TINY).items():
        other = replaced(TINY, name, other_value(name, value, hints()[name]))
        assert list(differences(TINY, other)) == list(differences(other, TINY)) == [name]
    assert differences(TINY, tiny()) == {}


def test_missing_json_fields_have_their_defaults():
    assert from_json({}) == Config()
    assert from_json({"train": {"steps": 5}}) == replaced(Config(), "train.steps", 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sead": 1}, "sead is not a field of this version of ddpm_jax"),
        ({"train": {"step": 1}}, "train.step is not a field of this version of ddpm_jax"),
        ({"train.steps": 1}, "train.steps is not a field of this version of ddpm_jax"),
        ({"seed": "1"}, "seed='1' is not a whole number"),
        ({"seed": None}, "seed=None is not a whole number"),
        ({"train": {"steps": 1.5}}, "train.steps=1.5 is not a whole number"),
        ({"train": {"flip": 0}}, "train.flip=0 is not true or false"),
        ({"model": {"ch_mult": [1, "2"]}}, "model.ch_mult=(1, '2') is not a tuple of whole numbers"),
        ({"model": {"ch_mult": [[1], 2]}}, "model.ch_mult=([1], 2) is not a tuple of whole numbers"),
        ({"data": {"source": ["digits"]}}, "data.source=('digits',) is not a text"),
        ({"data": {"cache": "gpu"}}, "data.cache='gpu' is not one of auto, device, host, none"),
        ({"data": {"cache": {}}}, "data.cache={} is not one of auto, device, host, none"),
        ({"train": 3}, "train is int, expected a JSON object"),
        ([], "the config is list, expected a JSON object"),
        (None, "the config is NoneType, expected a JSON object"),
    ],
)
def test_json_that_is_no_config_is_refused(values, message):
    with refuses(message):
        from_json(values)


def test_what_may_change_exists_and_computes_nothing():
    assert set(flatten(Config())) >= changeable()
    deciding = {name for name in flatten(Config()) if name.startswith("diffusion.")}
    deciding |= {
        "seed",
        "data.image_size",
        "data.channels",
        "data.value_range",
        "model.ch",
        "model.ch_mult",
        "model.dropout",
    }
    deciding |= {"model.num_res_blocks", "model.attn_resolutions", "model.groups", "model.dtype", "train.batch_size"}
    deciding |= {
        "train.lr",
        "train.warmup_steps",
        "train.adam_b1",
        "train.adam_b2",
        "train.adam_eps",
        "train.grad_clip",
    }
    deciding |= {"model.num_classes", "train.label_dropout", "data.condition", "data.condition_channels"}
    deciding |= {"train.ema_decay", "train.ema_warmup", "train.flip", "train.flip_ud", "train.turn", "train.init_from"}
    deciding |= {"train.ema_decays", "train.ema_widths"}
    assert deciding | changeable() == set(flatten(Config()))  # a new field is put into one of the two
    assert not deciding & changeable()


def test_every_field_has_help():
    helped = set()
    for node in ast.parse(inspect.getsource(configs)).body:
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(text.value.value, str)
                    assert len(text.value.value) > 10
                    helped.add((node.name, field.target.id))
    for section in (Config, *(type(getattr(TINY, name)) for name in SECTIONS)):
        for field in dataclasses.fields(section):
            if field.name not in SECTIONS:  # whose help is the docstring of the section's class
                assert (section.__name__, field.name) in helped, (section.__name__, field.name)


# ---- What a checkpoint remembers of it


@pytest.mark.parametrize("name", sorted(set(flatten(Config())) - changeable()))
def test_a_changed_field_is_named_and_no_other(name):
    old = flatten(TINY)[name]
    new = "other" if isinstance(old, str) else (7, 7) if isinstance(old, tuple) else not old
    recorded = json.loads(json.dumps(fixed_fields(TINY)))
    assert changed_fields(recorded, TINY) == []
    (change,) = changed_fields(recorded, replaced(TINY, name, new))
    assert change.startswith(f"{name} (checkpoint ")


def test_what_may_change_is_not_remembered():
    assert not set(fixed_fields(TINY)) & changeable()
    assert changed_fields(fixed_fields(TINY), tiny(train={"steps": 80, "save_every": 20})) == []


def test_a_field_that_an_earlier_version_did_not_have_had_its_default():
    recorded = fixed_fields(TINY)
    del recorded["diffusion.prediction"]
    assert changed_fields(recorded, TINY) == []
    assert changed_fields(recorded, tiny(diffusion={"prediction": "v"})) == [
        "diffusion.prediction (checkpoint 'eps', config.json 'v')"
    ]
    (change,) = changed_fields(recorded | {"model.later": 3}, TINY)
    assert change.startswith("model.later (checkpoint 3, ")


def test_a_number_beyond_every_float_is_refused():
    with pytest.raises(ConfigError, match=r"diffusion\.beta_end=1000.* is not a number"):
        check(tiny(diffusion={"beta_end": 10**400}))
