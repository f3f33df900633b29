"""A small classifier of labelled images, whose features judge samples where Inception's are not at hand.

    python convert.py classifier WORKDIR clothes.jax_export
    python evaluate.py WORKDIR --features clothes.jax_export

Distances of its features compare runs on the same data with each other. They are not comparable with published FIDs.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import export
from jaxtyping import Array, UInt8
from tqdm import tqdm

from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import Source, batch_indices
from ddpm_jax.data.pixels import from_uint8

PLATFORMS = ("cpu", "cuda", "tpu")
LEARNING_RATE = 2e-3  # at the start of a cosine that ends at 0
BATCH_SIZE = 64
PART = 500  # images that are read at a time


class Classifier(nn.Module):
    """Four convolutions, two of which halve the size, and two dense layers: images in [-1, 1] to features and logits."""

    classes: int
    width: int = 32
    features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        """x: float (B, H, W, C) -> {"features": (B, features), "logits": (B, classes)}."""
        for channels, stride in ((1, 1), (1, 2), (2, 1), (2, 2)):
            x = nn.relu(nn.Conv(channels * self.width, (3, 3), (stride, stride))(x))
        features = nn.Dense(self.features)(x.reshape(x.shape[0], -1))
        return {"features": features, "logits": nn.Dense(self.classes)(nn.relu(features))}


def outputs(model: Classifier, params: Any, images: UInt8[Array, "B H W C"]) -> dict[str, Array]:
    """The classifier's features and logits of uint8 images."""
    return cast(dict[str, Array], model.apply(params, from_uint8(images)))


def labels_of(source: Source) -> np.ndarray:
    """The labels of a source. Raises UsageError if it has none."""
    if source.labels is None:
        raise UsageError(
            "the images have no labels, by which a classifier learns; give images in a folder for each class"
        )
    return source.labels


def train_classifier(source: Source, *, epochs: int, seed: int = 0) -> tuple[Classifier, Any]:
    """Trains a classifier by Adam on the source's images and labels; returns it and its parameters.

    Logit k is that of the k-th label in order. The batches are those of a training run of this seed. Raises UsageError if the
    source has no labels.
    """
    classes, labels = np.unique(labels_of(source), return_inverse=True)
    model = Classifier(len(classes))
    steps = max(1, epochs * len(source) // BATCH_SIZE)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *source.images.shape[1:])))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            logits = outputs(model, params, images)["logits"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for i in tqdm(range(steps), desc="classifier", unit="step"):
        (indices,) = batch_indices(seed, i, 1, BATCH_SIZE, len(source))
        params, state = step(params, state, source.read(indices), labels[indices])
    return model, params


def accuracy(compute: Callable[[np.ndarray], dict[str, np.ndarray]], source: Source, classes: np.ndarray) -> float:
    """The share of a source's images whose largest logit is that of their label. classes: the labels in order."""
    labels, right = labels_of(source), 0
    for indices in np.array_split(np.arange(len(source)), -(-len(source) // PART)):
        logits = compute(source.read(indices))["logits"]
        right += int((classes[logits.argmax(axis=1)] == labels[indices]).sum())
    return right / len(source)


def classifier_file(model: Classifier, params: Any, image_shape: tuple[int, ...]) -> bytes:
    """The classifier as a program of `jax.export`, parameters included, which `evaluate.py --features` takes."""
    params = jax.tree.map(np.asarray, params)

    def program(images: UInt8[Array, "B H W C"]) -> dict[str, Array]:
        return outputs(model, params, images)

    (B,) = export.symbolic_shape("B")
    like = jax.ShapeDtypeStruct((B, *image_shape), jnp.uint8)
    return bytes(export.export(jax.jit(program), platforms=PLATFORMS)(like).serialize())
