"""What a config describes, built once: the process, the network, the loss and the optimizer."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.config import Config, ConfigError, check, num_labels
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data.conditions import Conditioning, conditioning_of
from ddpm_jax.data.pixels import Pixels
from ddpm_jax.diffusion.losses import LOSSES, Model, min_snr_weights
from ddpm_jax.diffusion.process import Process
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.models.unet import UNet

Params = Any
Loss = Callable[..., Float[Array, " B"]]


class Network(Protocol):
    """A network: x_t float (B, H, W, C) and t int (B,) -> output float (B, H, W, D). A Flax module is one.

    D is C, or 2 C for a learned variance. In training `apply` receives `dropout_keys`, one key for each image, if it or
    `__call__` has an argument of that name. With classes, `init` and `apply` receive `labels`, int (B,): 0 .. num_classes - 1,
    and num_classes for an image without a label. With conditions they receive `condition`, float (B, H, W, K).
    """

    def init(self, key: Any, x_t: Any, t: Any, /, **options: Any) -> Any:
        """{"params": parameters drawn from the key}."""

    def apply(self, variables: Any, x_t: Any, t: Any, /, **options: Any) -> Any:
        """The output at (x_t, t); variables: {"params": parameters}."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """What is trained, sampled and evaluated; built once from a config.

    Attributes:
        config: The config, which a workdir stores.
        process: The schedule, and what the network's output means.
        network: The U-Net, or any other network.
        image_shape: (H, W, C) of an image.
        conditioning: The conditions that the network is given beside x_t; None: it is given none.
        loss: (model, x_0, t, eps) -> float (B,), each image's loss with its weight of t.
        learning_rate: step -> the learning rate.
        optimizer: Gradient to update: clip by global norm, Adam, learning rate.

    Example:
        >>> from ddpm_jax import Config, Experiment
        >>> Experiment.from_config(Config()).image_shape
        (32, 32, 3)
    """

    config: Config
    process: Process
    network: Network
    image_shape: tuple[int, int, int]
    conditioning: Conditioning | None
    loss: Loss
    learning_rate: optax.Schedule
    optimizer: optax.GradientTransformation

    @classmethod
    def from_config(cls, config: Config, network: Network | None = None) -> "Experiment":
        """The experiment that a config describes.

        Args:
            config: The config, checked here before anything is built.
            network: Your own network, in place of the U-Net of `config.model`.

        Raises:
            ConfigError: A UsageError, for a config that cannot be run.
        """
        check(config, num_devices=None, own_network=network is not None)
        d, data = config.diffusion, config.data
        process = Process(
            make_schedule(d.schedule, T=d.T, beta_start=d.beta_start, beta_end=d.beta_end), d.prediction, d.variance
        )
        learning_rate = _learning_rate(config)
        experiment = cls(
            config=config,
            process=process,
            network=cast(Network, _unet(config, process)) if network is None else network,
            image_shape=(*data.size, data.channels),
            conditioning=conditioning_of(data),
            loss=_loss(config, process),
            learning_rate=learning_rate,
            optimizer=_optimizer(config, learning_rate),
        )
        if experiment.num_classes and not experiment._takes("labels"):
            raise ConfigError(
                f"model.num_classes={experiment.num_classes}, but the network {type(network).__name__} takes no labels; give "
                "its __call__ the argument labels, or set model.num_classes to 0"
            )
        if experiment.conditioning and not experiment._takes("condition"):
            raise ConfigError(
                f"data.condition={data.condition}, but the network {type(network).__name__} takes no condition; give its "
                "__call__ the argument condition, or set data.condition to none"
            )
        return experiment

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters of the network, drawn from the key."""
        given: dict[str, Any] = {"labels": jnp.zeros((1,), jnp.int32)} if self.num_classes else {}
        if self.conditioning:
            given["condition"] = jnp.zeros((1, *self.image_shape[:2], self.conditioning.shape[-1]))
        return self.network.init(key, jnp.zeros((1, *self.image_shape)), jnp.zeros((1,), jnp.int32), **given)["params"]

    def model(
        self,
        params: Params,
        dropout_keys: Key[Array, " B"] | None = None,
        labels: Int[Array, " B"] | int | None = None,
        condition: Float[Array, "B H W K"] | None = None,
    ) -> Model:
        """The function (x_t, t) -> output with these parameters, of these classes and conditions.

        Args:
            params: The network's parameters.
            dropout_keys: (B,), in training only.
            labels: The class of each image, int (B,), or one for all. Default no class, which a network with classes knows if
                it was trained with label dropout.
            condition: The condition of each image (`Conditioning.to_network`), or of one for all.

        Raises:
            UsageError: If the network needs labels or a condition and has none, or is given what it does not take.
        """
        options: dict[str, Any] = {}
        if dropout_keys is not None and self._takes("dropout_keys"):
            options["dropout_keys"] = dropout_keys
        if labels is not None and not self.num_classes:
            raise UsageError(
                "got labels for a network without classes; leave them out, or set model.num_classes and train"
            )
        if labels is None and self.num_classes:
            labels = self.null_label
        if (condition is None) != (self.conditioning is None):
            raise UsageError(
                "got a condition for a network without; leave it out, or set data.condition and train"
                if self.conditioning is None
                else f"the network was trained with a condition of each image (data.condition={self.config.data.condition}); "
                "give one"
            )

        def model(x_t, t):
            of = {} if labels is None else {"labels": jnp.broadcast_to(jnp.asarray(labels, jnp.int32), t.shape)}
            if condition is not None:
                of["condition"] = jnp.broadcast_to(condition, (x_t.shape[0], *condition.shape[1:]))
            return jnp.asarray(self.network.apply({"params": params}, x_t, t, **options, **of))

        return model

    def split(self, rows: Any) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W K"] | None]:
        """Images in [-1, 1], and their conditions if there are any, of rows (B, H, W, D) of a source (`Source.rows`)."""
        if self.conditioning is None:
            return self.pixels.to_network(rows), None
        images, conditions = self.conditioning.split(rows)
        return self.pixels.to_network(images), self.conditioning.to_network(conditions)

    def check_unconditional(self, what: str) -> None:
        """Raises UsageError for a run with conditions. what: the thing that knows none."""
        if self.conditioning is not None:
            raise UsageError(
                f"{what} knows no conditions, and this network has them (data.condition={self.config.data.condition}); take a "
                "run without"
            )

    @property
    def num_classes(self) -> int:
        """The number of classes; 0: none."""
        return self.config.model.num_classes

    @property
    def null_label(self) -> int:
        """The label of no class, num_classes. Raises UsageError if the network does not know it."""
        if not self.config.train.label_dropout:
            raise UsageError(
                "the network was trained with every image's label (train.label_dropout=0), so it needs one for each image and "
                "cannot be guided without classes; give labels, or train with --train.label-dropout 0.1"
            )
        return self.num_classes

    @property
    def pixels(self) -> Pixels:
        """How the images are stored, and what their values become."""
        return Pixels(self.config.data.value_range)

    @property
    def makes_pictures(self) -> bool:
        """Whether the images are what PNG holds: of 8 bits, and grey or RGB."""
        return self.config.data.value_range is None and self.config.data.channels in (1, 3)

    @property
    def has_own_network(self) -> bool:
        """Whether the network is not the U-Net of the config."""
        return not isinstance(self.network, UNet)

    def _takes(self, argument: str) -> bool:
        """Whether the network has an argument of this name."""
        functions = (self.network.apply, type(self.network).__call__ if callable(self.network) else None)
        return any(argument in inspect.signature(f).parameters for f in functions if f is not None)


def _unet(config: Config, process: Process) -> UNet:
    """The U-Net of a config; a learned variance doubles its output channels."""
    fields = dataclasses.asdict(config.model) | {"dtype": jnp.dtype(config.model.dtype)}
    del fields["num_classes"]
    return UNet(
        **fields,
        num_labels=num_labels(config),
        out_channels=config.data.channels * (2 if process.learns_variance else 1),
    )


def _loss(config: Config, process: Process) -> Loss:
    loss, weights = LOSSES[config.diffusion.loss], None
    if config.diffusion.loss_weighting == "min_snr":
        weights = min_snr_weights(process, config.diffusion.min_snr_gamma)

    def weighted(model, x_0, t, eps):
        values = loss(process, model, x_0, t, eps)
        return values if weights is None else values * jnp.asarray(weights, values.dtype)[t]

    return weighted


def _learning_rate(config: Config) -> optax.Schedule:
    """0 at step 0, linear up to train.lr at train.warmup_steps, constant after."""
    if config.train.warmup_steps == 0:
        return optax.constant_schedule(config.train.lr)
    return optax.linear_schedule(0.0, config.train.lr, config.train.warmup_steps)


def _optimizer(config: Config, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    # This clips the global gradient. The authors' code clips the gradient of each TPU core.
    train = config.train
    return optax.chain(
        optax.clip_by_global_norm(train.grad_clip),
        optax.scale_by_adam(b1=train.adam_b1, b2=train.adam_b2, eps=train.adam_eps),
        optax.scale_by_learning_rate(learning_rate),
    )
