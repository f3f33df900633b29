"""The training step: Algorithm 1 with gradient clipping, Adam, warm-up and EMA, several steps in one compiled scan.

Every draw of step s depends on (seed, s) alone and is made for the whole global batch, so a run can be cut anywhere, moved to
other devices or accumulated in parts without changing a draw.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from ddpm_jax import rng, sharding
from ddpm_jax.config import Config
from ddpm_jax.diffusion import losses
from ddpm_jax.diffusion.process import Process
from ddpm_jax.diffusion.schedules import Schedule, make_schedule
from ddpm_jax.models.unet import UNet
from ddpm_jax.rng import Purpose

Params = Any


@flax.struct.dataclass
class TrainState:
    """All that changes in training. No random state is among it: the step is enough."""

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    loss_history: losses.LossHistory | None


def build_schedule(config: Config) -> Schedule:
    """The schedule that the config describes."""
    d = config.diffusion
    return make_schedule(d.schedule, T=d.T, beta_start=d.beta_start, beta_end=d.beta_end)


def build_process(config: Config) -> Process:
    """The process that the config describes."""
    return Process(build_schedule(config), config.diffusion.prediction, config.diffusion.variance)


def build_unet(config: Config) -> UNet:
    """The network that the config describes; a learned variance doubles its output channels."""
    learned = config.diffusion.variance in ("learned", "learned_range")
    return UNet(
        ch=config.model.ch,
        ch_mult=config.model.ch_mult,
        num_res_blocks=config.model.num_res_blocks,
        attn_resolutions=config.model.attn_resolutions,
        out_channels=config.data.channels * (2 if learned else 1),
        dropout=config.model.dropout,
        groups=config.model.groups,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
    )


def learning_rate(config: Config) -> optax.Schedule:
    """step -> learning rate: 0 at step 0, linear up to train.lr at train.warmup_steps, constant after."""
    if config.train.warmup_steps == 0:
        return optax.constant_schedule(config.train.lr)
    return optax.linear_schedule(0.0, config.train.lr, config.train.warmup_steps)


def build_optimizer(config: Config) -> optax.GradientTransformation:
    """Clip by global norm, Adam, warm-up. The global gradient is clipped; the authors' code clips each TPU core's."""
    train = config.train
    return optax.chain(
        optax.clip_by_global_norm(train.grad_clip),
        optax.scale_by_adam(b1=train.adam_b1, b2=train.adam_b2, eps=train.adam_eps),
        optax.scale_by_learning_rate(learning_rate(config)),
    )


def state_from_params(config: Config, params: Params) -> TrainState:
    """The state at step 0 with these parameters: their EMA equal to them, nothing seen by the optimizer."""
    by_history = config.diffusion.t_sampler == "loss_history"
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=build_optimizer(config).init(params),
        loss_history=losses.init_loss_history(config.diffusion.T) if by_history else None,
    )


def init_state(config: Config, key: Key[Array, ""]) -> TrainState:
    """The state at step 0, its parameters drawn from the key.

    Pure: give it to `jax.jit` or `jax.eval_shape`. A run uses the key of its INIT stream.
    """
    size = config.data.image_size
    x_t = jnp.zeros((1, size, size, config.data.channels))
    return state_from_params(config, build_unet(config).init(key, x_t, jnp.zeros((1,), jnp.int32))["params"])


def init_sharded_state(config: Config, mesh: Mesh) -> TrainState:
    """`init_state` of the run's seed, each array born on the devices that will hold it."""
    key = rng.stream(rng.root_key(config.seed), Purpose.INIT)
    shapes = jax.eval_shape(lambda: init_state(config, key))
    return jax.jit(lambda: init_state(config, key), out_shardings=sharding.state_sharding(mesh, shapes))()


def image_losses(config: Config) -> Callable[..., Float[Array, " B"]]:
    """The config's loss of each image, (model, x_0, t, eps) -> (B,), with its weight of t."""
    d, process = config.diffusion, build_process(config)
    loss = losses.LOSSES[d.loss]
    weights = None
    if d.loss_weighting == "min_snr":
        weights = losses.min_snr_weights(process, d.min_snr_gamma)

    def weighted(model, x_0, t, eps):
        values = loss(process, model, x_0, t, eps)
        return values if weights is None else values * jnp.asarray(weights, values.dtype)[t]

    return weighted


class Draws(NamedTuple):
    """All random draws of one step, for the whole global batch."""

    flip: Bool[Array, " B"]
    t: Int[Array, " B"]
    weights: Float[Array, " B"]  # of t's importance sampling; 1 where t is uniform
    eps: Float[Array, "B H W C"]
    dropout_keys: Key[Array, " B"]


def draw(config: Config, step: Int[Array, ""], shape: tuple[int, ...], history: losses.LossHistory | None) -> Draws:
    """The draws of a step, a pure function of (seed, step), and of the loss history where t is chosen by it.

    shape: (B, H, W, C) of the global batch.
    """
    root = rng.root_key(config.seed)
    keys = {purpose: rng.step_key(root, purpose, step) for purpose in Purpose}
    B, T = shape[0], config.diffusion.T
    if history is None:
        t, weights = losses.sample_t(keys[Purpose.T], B, T), jnp.ones((B,))
    else:
        t, weights = losses.importance_sample_t(keys[Purpose.T], B, history)
    return Draws(
        flip=jax.random.bernoulli(keys[Purpose.FLIP], shape=(B,)),
        t=t,
        weights=weights,
        eps=jax.random.normal(keys[Purpose.EPS], shape),
        dropout_keys=rng.image_keys(keys[Purpose.DROPOUT], jnp.arange(B)),
    )


def _parts(x: Array, n: int) -> Array:
    """(B, ...) -> (n, B/n, ...). Images are dealt out in turn, so that a batch split over devices stays where it is."""
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)


def one_step(config: Config) -> Callable[[TrainState, UInt8[Array, "B H W C"]], tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, images) -> (state, metrics) of one training step, Algorithm 1 (not compiled).

    images: uint8 (B, H, W, C). metrics: float32 scalars `loss` (mean over the batch) and `grad_norm` (before clipping).
    """
    unet, optimizer = build_unet(config), build_optimizer(config)
    loss_of_images = image_losses(config)
    n = config.train.accumulation

    def mean_loss(params, x_0, t, eps, weights, dropout_keys):
        def model(x_t, t):
            return unet.apply({"params": params}, x_t, t, dropout_keys)

        values = loss_of_images(model, x_0, t, eps)
        return jnp.mean(values * weights), values

    def gradient(params, batch):
        """Gradient of the mean loss, and each image's loss, in n parts one after the other."""
        value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
        if n == 1:
            return value_and_grad(params, *batch)

        def add_part(total, part):
            (loss, values), gradient = value_and_grad(params, *part)
            return jax.tree.map(lambda a, b: a + b / n, total, (loss, gradient)), values

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (loss, grads), values = jax.lax.scan(add_part, zero, jax.tree.map(lambda x: _parts(x, n), batch))
        return (loss, values.T.reshape(-1)), grads

    def step(state, images):
        x_0 = images.astype(jnp.float32) / 127.5 - 1.0
        flip, t, weights, eps, dropout_keys = draw(config, state.step, x_0.shape, state.loss_history)
        if config.train.flip:
            x_0 = jnp.where(flip[:, None, None, None], x_0[:, :, ::-1], x_0)
        (loss, values), grads = gradient(state.params, (x_0, t, eps, weights, dropout_keys))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        history = state.loss_history
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=optax.incremental_update(params, state.ema_params, 1.0 - config.train.ema_decay),
            opt_state=opt_state,
            loss_history=None if history is None else losses.update_loss_history(history, t, values),
        )
        return new_state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return step


def make_train_step(config: Config, *, mesh: Mesh | None = None) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles (state, batches, dataset) -> (state, metrics): a scan over as many steps as `batches` has.

    batches: uint8 (S, B, H, W, C), the images of S steps, with dataset None; or int32 (S, B), their places in `dataset`,
    uint8 (N, H, W, C) on the devices. metrics: float32 (S,) each. The state is donated: use the returned one. Also one
    step runs through the scan, since a step inside a scan and one outside round differently. mesh: what the state and the
    batches lie on (`sharding.make_mesh`); default all devices.
    """
    mesh = sharding.make_mesh(fsdp=config.train.fsdp) if mesh is None else mesh
    step = one_step(config)
    shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
    state_sharding = sharding.state_sharding(mesh, shapes)

    def train_steps(state, batches, dataset):
        def body(state, batch):
            images = batch if dataset is None else dataset[batch]
            images = jax.lax.with_sharding_constraint(images, sharding.split(mesh))
            # The barrier keeps the look-up out of the step's own kernels, which would round differently with it inside.
            return step(state, jax.lax.optimization_barrier(images))

        return jax.lax.scan(body, state, batches)

    return jax.jit(
        train_steps,
        in_shardings=(state_sharding, sharding.split(mesh, axis=1), sharding.replicated(mesh)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
    )
