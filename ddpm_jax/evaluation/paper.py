"""The numbers that the paper reports for its recipes: Tables 1 to 3 and section 4.3."""

import re
from typing import Any

from ddpm_jax.config import Config, flatten

# The CIFAR-10 recipe, the config's defaults: every field that affects what is learned.
CIFAR10 = {
    name: value
    for name, value in flatten(Config()).items()
    if name
    in ("data.image_size", "data.channels", "data.value_range", "train.lr", "train.batch_size", "train.warmup_steps")
    or name.startswith(("model.", "diffusion.", "train.adam_", "train.ema_", "train.grad_", "train.flip", "train.turn"))
    if name not in ("model.dtype", "model.remat")
}
LARGE256 = CIFAR10 | {
    "data.image_size": 256,
    "model.ch_mult": (1, 1, 2, 2, 4, 4),
    "model.dropout": 0.0,
    "diffusion.variance": "fixed_small",
    "train.batch_size": 64,
    "train.lr": 2e-5,
    "train.flip": False,
}


def _cifar10(prediction: str, loss: str, variance: str) -> dict[str, Any]:
    return CIFAR10 | {"diffusion.prediction": prediction, "diffusion.loss": loss, "diffusion.variance": variance}


# (a pattern of the data source's name in letters and digits alone, the config's fields, numbers by metric)
RECIPES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    (
        r"cifar10(?!\d)",
        _cifar10("eps", "simple", "fixed_large"),
        {
            "fid": "3.17 (train set), 5.24 (test set)",
            "is": "9.46 ± 0.11",
            "nll": "at most 3.75 (test), 3.72 (train)",
            "rate-distortion": "rate 1.78, distortion 1.97 bits/dim, RMSE 0.95",
        },
    ),
    (
        r"cifar10(?!\d)",
        _cifar10("eps", "vb", "fixed_large"),
        {"fid": "13.51", "is": "7.67", "nll": "at most 3.70, train 3.69"},
    ),
    (r"cifar10(?!\d)", _cifar10("x_prev", "vb", "fixed_large"), {"fid": "13.22", "is": "8.06"}),
    (r"cifar10(?!\d)", _cifar10("x_prev", "vb", "learned"), {"fid": "23.69", "is": "7.28"}),
    ("lsunbedroom", LARGE256, {"fid": "6.36"}),
    ("lsunbedroom", LARGE256 | {"model.ch": 192}, {"fid": "4.90"}),
    ("lsunchurch", LARGE256 | {"train.flip": True}, {"fid": "7.89"}),
    ("lsuncat", LARGE256, {"fid": "19.75"}),
]


def papers_numbers(config: dict[str, Any], source: str) -> dict[str, str]:
    """The paper's numbers for a config (flat, from `config.flatten`) and a data source, by metric; {} if it is no recipe."""
    name = re.sub("[^a-z0-9]", "", source.lower())
    for pattern, fields, numbers in RECIPES:
        if re.search(pattern, name) and all(config[field] == value for field, value in fields.items()):
            return numbers
    return {}
