"""The paper's own numbers, for the runs whose config is one of its recipes: Tables 1 to 3 and section 4.3."""

import re
from typing import Any

CIFAR10 = {
    "data.image_size": 32,
    "data.channels": 3,
    "model.ch": 128,
    "model.ch_mult": (1, 2, 2, 2),
    "diffusion.T": 1000,
}
LARGE256 = {"data.image_size": 256, "data.channels": 3, "model.ch_mult": (1, 1, 2, 2, 4, 4), "diffusion.T": 1000}
PAPERS_SCHEDULE = {"diffusion.schedule": "linear", "diffusion.beta_start": 1e-4, "diffusion.beta_end": 0.02}


def _cifar10(prediction: str, loss: str, variance: str) -> dict[str, Any]:
    return CIFAR10 | {"diffusion.prediction": prediction, "diffusion.loss": loss, "diffusion.variance": variance}


# (what the data source's name has in it, fields that a config must have, numbers by metric)
RECIPES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    (
        "cifar10",
        _cifar10("eps", "simple", "fixed_large"),
        {
            "fid": "3.17 (train set), 5.24 (test set)",
            "is": "9.46 ± 0.11",
            "nll": "at most 3.75 (test), 3.72 (train)",
            "rate-distortion": "rate 1.78, distortion 1.97 bits/dim, RMSE 0.95",
        },
    ),
    (
        "cifar10",
        _cifar10("eps", "vb", "fixed_large"),
        {"fid": "13.51", "is": "7.67", "nll": "at most 3.70, train 3.69"},
    ),
    ("cifar10", _cifar10("x_prev", "vb", "fixed_large"), {"fid": "13.22", "is": "8.06"}),
    ("cifar10", _cifar10("x_prev", "vb", "learned"), {"fid": "23.69", "is": "7.28"}),
    ("lsunbedroom", LARGE256 | {"model.ch": 128}, {"fid": "6.36"}),
    ("lsunbedroom", LARGE256 | {"model.ch": 192}, {"fid": "4.90"}),
    ("lsunchurch", LARGE256 | {"model.ch": 128}, {"fid": "7.89"}),
    ("lsuncat", LARGE256 | {"model.ch": 128}, {"fid": "19.75"}),
]


def papers_numbers(config: dict[str, Any], source: str) -> dict[str, str]:
    """What the paper reports of a config (flat, as `config.flatten` gives it) on a data source, by metric; else nothing."""
    name = re.sub("[^a-z0-9]", "", source.lower())
    for word, fields, numbers in RECIPES:
        wanted = {**fields, **PAPERS_SCHEDULE}
        if word in name and all(config[field] == value for field, value in wanted.items()):
            return numbers
    return {}
