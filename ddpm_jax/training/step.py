"""The training step: Algorithm 1 with gradient clipping, Adam, warm-up and EMA, several steps in one compiled scan.

The draws of step s depend on (seed, s) alone and are made for the whole global batch. Neither a resume, other devices nor
accumulation changes a draw.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from ddpm_jax.core import rng, sharding
from ddpm_jax.core.rng import Purpose
from ddpm_jax.diffusion import losses
from ddpm_jax.training.augmentation import augment
from ddpm_jax.training.ema import update_averages, update_ema
from ddpm_jax.training.experiment import Experiment, Params
from ddpm_jax.training.weights import tracked


@flax.struct.dataclass
class TrainState:
    """All that changes in training. It holds no random state, since the draws depend on the step.

    averages: the further averages of the parameters by name (`weights.tracked`); None if there are none.

    Example:
        >>> import jax
        >>> from ddpm_jax import Config, Experiment, TrainState, init_state
        >>> experiment = Experiment.from_config(Config())
        >>> isinstance(jax.eval_shape(lambda: init_state(experiment, jax.random.key(0))), TrainState)
        True
    """

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    loss_history: losses.LossHistory | None
    averages: dict[str, Params] | None = None


def state_from_params(experiment: Experiment, params: Params) -> TrainState:
    """The state at step 0 with these parameters: equal averages and a fresh optimizer state."""
    by_history = experiment.config.diffusion.t_sampler == "loss_history"
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=experiment.optimizer.init(params),
        loss_history=losses.init_loss_history(experiment.process.schedule.T) if by_history else None,
        averages=equal_averages(experiment, params),
    )


def equal_averages(experiment: Experiment, params: Params) -> dict[str, Params] | None:
    """The further averages that equal these parameters, which they start from; None if the config asks for none."""
    return {name: jax.tree.map(jnp.copy, params) for name in tracked(experiment.config.train)} or None


def init_state(experiment: Experiment, key: Key[Array, ""]) -> TrainState:
    """The state at step 0 with random parameters.

    Pure: give it to `jax.jit` or `jax.eval_shape`. A run uses the key of its INIT stream.

    Args:
        experiment: What is trained.
        key: A key of threefry2x32, `rng.root_key(seed)` say.

    Returns:
        A `TrainState` whose EMA equals the parameters.

    Example:
        >>> import jax
        >>> from ddpm_jax import Config, Experiment, init_state
        >>> experiment = Experiment.from_config(Config())
        >>> state = jax.eval_shape(lambda: init_state(experiment, jax.random.key(0)))
        >>> sum(array.size for array in jax.tree.leaves(state.params))
        35746307
    """
    return state_from_params(experiment, experiment.init(key))


def abstract_state(experiment: Experiment, mesh: Mesh | None = None) -> TrainState:
    """The state as ShapeDtypeStructs, with a run's shardings if a mesh is given."""
    shapes = jax.eval_shape(lambda: init_state(experiment, jax.random.key(0)))
    if mesh is None:
        return shapes
    layout = sharding.state_sharding(mesh, shapes)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, layout)


def init_sharded_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """`init_state` of the run's seed, with each array created on its devices."""
    key = rng.stream(rng.root_key(experiment.config.seed), Purpose.INIT)
    layout = sharding.state_sharding(mesh, abstract_state(experiment))
    return jax.jit(lambda: init_state(experiment, key), out_shardings=layout)()


Batch = Shaped[Array, "B H W C"] | tuple[Shaped[Array, "B H W C"], Int[Array, " B"]]


class Draws(NamedTuple):
    """All random draws of one step, for the whole global batch."""

    flip: Bool[Array, " B"]
    t: Int[Array, " B"]
    weights: Float[Array, " B"]  # importance weights of t; 1 if t is uniform
    eps: Float[Array, "B H W C"]
    dropout_keys: Key[Array, " B"]
    drop_label: Bool[Array, " B"]
    flip_ud: Bool[Array, " B"]
    turn: Int[Array, " B"]  # quarter turns


def draw(
    experiment: Experiment, step: Int[Array, ""], shape: tuple[int, ...], history: losses.LossHistory | None
) -> Draws:
    """The draws of a step: a function of (seed, step), and of the loss history if t is drawn by it.

    shape: (B, H, W, C) of the global batch.
    """
    root = rng.root_key(experiment.config.seed)
    keys = {purpose: rng.step_key(root, purpose, step) for purpose in Purpose}
    B, T = shape[0], experiment.process.schedule.T
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
        drop_label=jax.random.bernoulli(keys[Purpose.LABEL_DROPOUT], experiment.config.train.label_dropout, shape=(B,)),
        flip_ud=jax.random.bernoulli(keys[Purpose.FLIP_UD], shape=(B,)),
        turn=jax.random.randint(keys[Purpose.TURN], (B,), 0, 4),
    )


def _parts(x: Array, n: int) -> Array:
    """(B, ...) -> (n, B/n, ...). Part i takes images i, i + n, ..., so that no image moves to another device."""
    return jnp.moveaxis(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 1, 0)


def _accumulate(value_and_grad: Callable[..., Any], params: Any, batch: Any, n: int) -> Any:
    """The mean loss and each image's loss, and the gradient of the first, accumulated over n parts of a batch."""
    if n == 1:
        return value_and_grad(params, *batch)

    def add_part(total, part):
        (loss, values), gradient = value_and_grad(params, *part)
        return jax.tree.map(lambda a, b: a + b / n, total, (loss, gradient)), values

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), values = jax.lax.scan(add_part, zero, jax.tree.map(lambda x: _parts(x, n), batch))
    return (loss, values.T.reshape(-1)), grads


def one_step(
    experiment: Experiment, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The pure function (state, batch) -> (state, metrics) of one training step, Algorithm 1 (not compiled).

    batch: images (B, H, W, C) as they are stored, with paired conditions as further channels; with classes a pair of them and
    int labels (B,). metrics: float32 scalars `loss` (mean over the batch) and `grad_norm` (before clipping).

    mesh: that of a state which train.fsdp splits. A step gathers its parameters once and sums the gradients over all devices,
    with accumulation those of each part; each device updates its part of the state.
    """
    options = experiment.config.train

    def mean_loss(params, x_0, t, eps, weights, *given):
        values = experiment.loss(experiment.model(params, *given), x_0, t, eps)
        return jnp.mean(values * weights), values

    def value_and_grad(params, *batch):
        value, grads = jax.value_and_grad(mean_loss, has_aux=True)(sharding.whole(params, mesh), *batch)
        # Whole first: else XLA sums each device's part in a loop over all devices, with further copies of the images.
        return value, sharding.scattered(sharding.whole(grads, mesh), mesh)

    def step(state, batch):
        images, labels = batch if isinstance(batch, tuple) else (batch, None)
        if labels is None and experiment.num_classes:
            raise ValueError(f"got images alone, expected images and labels of {experiment.num_classes} classes")
        x_0, condition = experiment.split(images)
        draws = draw(experiment, state.step, x_0.shape, state.loss_history)
        t, weights, eps, dropout_keys = draws.t, draws.weights, draws.eps, draws.dropout_keys
        x_0 = augment(options, x_0, draws.flip, draws.flip_ud, draws.turn)
        if condition is not None:
            condition = augment(options, condition, draws.flip, draws.flip_ud, draws.turn)
        if options.label_dropout:
            labels = jnp.where(draws.drop_label, experiment.null_label, labels)
        given = (x_0, t, eps, weights, dropout_keys, labels, condition)
        (loss, values), grads = _accumulate(value_and_grad, state.params, given, options.accumulation)
        updates, opt_state = experiment.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        history = state.loss_history
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema_params=update_ema(options, state.ema_params, params, state.step),
            opt_state=opt_state,
            loss_history=None if history is None else losses.update_loss_history(history, t, values),
            averages=update_averages(options, state.averages, params, state.step),
        )
        return new_state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return step


def make_train_step(
    experiment: Experiment, *, mesh: Mesh | None = None
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles (state, batches, dataset) -> (state, metrics): a scan over as many steps as `batches` has.

    A single step runs through the scan too, since a step outside of a scan rounds differently.

    Args:
        experiment: What is trained.
        mesh: The devices of the state and the batches (`sharding.make_mesh`); default all devices.

    Returns:
        The compiled function. batches: (S, B, H, W, C), the stored images of S steps, with dataset None; or int32 (S, B),
        their indices into `dataset`, (N, H, W, C) on the devices. With classes, images are a pair: these and their labels,
        int32 (S, B) or (N,). metrics: `loss` and `grad_norm`, float32 (S,). The state is
        donated: use the returned one.

    Example:
        >>> from ddpm_jax import Config, Experiment, make_train_step
        >>> train_step = make_train_step(Experiment.from_config(Config()))    # compiled at its first call
        >>> callable(train_step)
        True
    """
    mesh = sharding.make_mesh(fsdp=experiment.config.train.fsdp) if mesh is None else mesh
    step = one_step(experiment, mesh)
    state_sharding = sharding.state_sharding(mesh, abstract_state(experiment))

    def train_steps(state, batches, dataset):
        def body(state, batch):
            batch = batch if dataset is None else jax.tree.map(lambda array: array[batch], dataset)
            batch = jax.lax.with_sharding_constraint(batch, sharding.split(mesh))
            # The barrier keeps the look-up from fusing into the step's kernels, which would then round differently.
            return step(state, jax.lax.optimization_barrier(batch))

        return jax.lax.scan(body, state, batches)

    return jax.jit(
        train_steps,
        in_shardings=(state_sharding, sharding.split(mesh, axis=1), sharding.replicated(mesh)),
        out_shardings=(state_sharding, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=sharding.compiler_options(mesh),
    )
