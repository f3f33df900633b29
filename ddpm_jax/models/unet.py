"""The paper's U-Net (appendix B), as in the authors' code: eps_theta(x_t, t), or another prediction.

Layers have the authors' names (`down_1_block_0`, `nin_shortcut`, ...), so their checkpoints map one to one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.core.rng import random_bits
from ddpm_jax.models.convolution import conv, conv_in_training
from ddpm_jax.models.fusion import apart

Dtype = jnp.dtype | type


def kernel_init(scale: float = 1.0):
    """The authors' initialisation: uniform in +-sqrt(3 scale / fan_avg), whose variance is scale / fan_avg."""

    def init(key, shape, dtype=jnp.float32):
        *window, fan_in, fan_out = shape
        limit = math.sqrt(3 * scale / (math.prod(window) * (fan_in + fan_out) / 2))
        return (random_bits(key[None], shape)[0] * (limit / 2**31) - limit).astype(dtype)

    return init


_ZERO = 1e-10  # the scale of layers that start as "zero": drawn very small in the authors' code, not set to 0


class Conv(nn.Module):
    """Convolution with TensorFlow's SAME padding and the authors' initialisation: (B, H, W, C) -> (B, h, w, features)."""

    features: int
    stride: int = 1
    scale: float = 1.0
    dtype: Dtype = jnp.float32
    training: bool = False

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", kernel_init(self.scale), (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        convolve = conv_in_training if self.training else conv
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride) + bias[None, None, None, :]


def dense(features: int, *, name: str, dtype: Dtype, scale: float = 1.0) -> nn.Dense:
    """Affine map of the last axis with the authors' initialisation; on images it is their 1x1 convolution "nin"."""
    return nn.Dense(features, kernel_init=kernel_init(scale), dtype=dtype, name=name)


class GroupNorm(nn.Module):
    """Group normalisation over H, W and a group's channels: eps 1e-6, statistics in float32 (or wider) for any dtype."""

    groups: int

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))

        # Reduced over pixels before the channels are grouped: the minor axis stays whole, which every backend does faster.
        def group_mean(a):  # (B, H, W, C) -> (B, 1, 1, C)
            mean = a.mean(axis=(1, 2)).reshape(B, self.groups, C // self.groups).mean(axis=-1)
            return jnp.repeat(mean, C // self.groups, axis=1)[:, None, None, :]

        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        h = h - group_mean(h)
        h = h * (jax.lax.rsqrt(group_mean(h**2) + 1e-6) * scale[None, None, None, :]) + bias[None, None, None, :]
        return h.astype(x.dtype)


def timestep_embedding(t: Int[Array, " B"], dim: int) -> Float[Array, "B dim"]:
    """Sinusoids of t: [sin, cos] halves, frequencies exp(-ln(10000) i / (dim/2 - 1)), float32; dim even, >= 4."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def dropout(x: Float[Array, "B H W C"], keys: Key[Array, " B"], rate: float) -> Float[Array, "B H W C"]:
    """Zeroes each entry with probability `rate`, scales the others by 1 / (1 - rate); image b draws from keys[b] alone."""
    # The barrier has the bits drawn once: XLA would draw them for each convolution that uses them, forward and backward.
    kept = jax.lax.optimization_barrier(random_bits(keys, x.shape[1:]) < jnp.uint32(round((1 - rate) * 2**32)))
    return jnp.where(kept, x * (1 / (1 - rate)), jnp.zeros((), x.dtype))


class ResidualBlock(nn.Module):
    """norm, swish, conv, + temb, norm, swish, dropout, conv, + shortcut (a 1x1 where the channels change)."""

    features: int
    groups: int
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x, temb, dropout_keys):
        training = dropout_keys is not None
        h = nn.swish(GroupNorm(self.groups, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, training=training, name="conv1")(h)
        h += dense(self.features, name="temb_proj", dtype=self.dtype)(nn.swish(temb))[:, None, None, :]
        h = nn.swish(GroupNorm(self.groups, name="norm2")(h))
        if training and self.dropout > 0:
            h = dropout(h, dropout_keys, self.dropout)
        h = Conv(self.features, scale=_ZERO, dtype=self.dtype, training=training, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, name="nin_shortcut", dtype=self.dtype)(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, one head, scores q k / sqrt(C), softmax in float32; added to its input."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        h = GroupNorm(self.groups, name="norm")(x).reshape(B, H * W, C)
        q, k, v = (dense(C, name=name, dtype=self.dtype)(h) for name in ("q", "k", "v"))
        float32 = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=float32) * C**-0.5
        weights = nn.softmax(apart(scores), axis=-1).astype(self.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v)
        h = dense(C, name="proj_out", dtype=self.dtype, scale=_ZERO)(h)
        return x + h.reshape(B, H, W, C)


def upsample(x: Float[Array, "B H W C"]) -> Float[Array, "B 2H 2W C"]:
    """Repeats every pixel twice in both directions (nearest neighbour)."""
    B, H, W, C = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)


class UNet(nn.Module):
    """eps_theta(x_t, t): float (B, H, W, C), int (B,) -> float (B, H, W, out_channels).

    The defaults are the CIFAR-10 network, 35,746,307 parameters. H and W must be divisible by 2 ** (len(ch_mult) - 1).

    Attributes:
        ch: Base channels, even.
        ch_mult: Channels of each level, in units of ch.
        num_res_blocks: Residual blocks per level on the way down, one more on the way up.
        attn_resolutions: Shorter sides with attention after every block; the middle always has it.
        out_channels: Channels of the output; twice the image's for a learned variance.
        dropout: Probability that a feature is dropped.
        groups: Groups of every group normalisation; divides every number of channels.
        num_labels: Labels that the network is given, with that of no class; 0: none.
        dtype: Of the computation; parameters, norm statistics, softmax and the output are always float32.
        remat: Recompute each block in the backward pass instead of storing its activations.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ddpm_jax import UNet
        >>> unet = UNet(ch=8, ch_mult=(1, 2), attn_resolutions=(4,), out_channels=1, groups=4)
        >>> x_t, t = jnp.zeros((2, 8, 8, 1)), jnp.zeros((2,), jnp.int32)
        >>> variables = jax.eval_shape(unet.init, jax.random.key(0), x_t, t)    # jax.jit(unet.init)(...) draws them
        >>> jax.eval_shape(unet.apply, variables, x_t, t).shape
        (2, 8, 8, 1)
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    out_channels: int = 3
    dropout: float = 0.0
    groups: int = 32
    num_labels: int = 0
    dtype: Dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        t: Int[Array, " B"],
        dropout_keys: Key[Array, " B"] | None = None,
        labels: Int[Array, " B"] | None = None,
        condition: Float[Array, "B H W K"] | None = None,
    ) -> Float[Array, "B H W D"]:
        """The output at (x_t, t).

        dropout_keys: (B,), one for each image, in training. Without them there is no dropout, and forward-mode derivatives
        (`jax.jvp`) work. labels: (B,), 0 .. num_labels - 1; given if and only if num_labels is not 0.
        condition: a picture of each image, which the first convolution takes as further channels (SR3, Saharia et al. 2021).
        """
        self._check_size(x_t)
        temb = self._embed(t, labels)
        residual_type = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        attention_type = nn.remat(AttentionBlock) if self.remat else AttentionBlock
        num_dropouts = 0

        def block(h, features, name):
            nonlocal num_dropouts
            keys = None if dropout_keys is None else jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, num_dropouts)
            num_dropouts += 1
            layer = residual_type(features, self.groups, self.dropout, self.dtype, name=name)
            return layer(h, temb, keys)

        def attention(h, name):
            return attention_type(self.groups, self.dtype, name=name)(h)

        conv3x3 = functools.partial(Conv, dtype=self.dtype, training=dropout_keys is not None)

        h = x_t if condition is None else jnp.concatenate([x_t, condition], axis=-1)
        h = conv3x3(self.ch, name="conv_in")(h)
        skips = [h]
        for i, mult in enumerate(self.ch_mult):
            for j in range(self.num_res_blocks):
                h = block(h, self.ch * mult, f"down_{i}_block_{j}")
                if min(h.shape[1:3]) in self.attn_resolutions:
                    h = attention(h, f"down_{i}_attn_{j}")
                skips.append(h)
            if i != len(self.ch_mult) - 1:
                h = conv3x3(self.ch * mult, stride=2, name=f"down_{i}_downsample")(h)
                skips.append(h)

        h = block(h, h.shape[-1], "mid_block_1")
        h = attention(h, "mid_attn_1")
        h = block(h, h.shape[-1], "mid_block_2")

        for i, mult in reversed(list(enumerate(self.ch_mult))):
            for j in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), self.ch * mult, f"up_{i}_block_{j}")
                if min(h.shape[1:3]) in self.attn_resolutions:
                    h = attention(h, f"up_{i}_attn_{j}")
            if i != 0:
                h = conv3x3(self.ch * mult, name=f"up_{i}_upsample")(upsample(h))

        h = nn.swish(GroupNorm(self.groups, name="norm_out")(h))
        out_dtype = jnp.promote_types(self.dtype, jnp.float32)
        return apart(conv3x3(self.out_channels, scale=_ZERO, dtype=out_dtype, name="conv_out")(h))

    def _embed(self, t: Int[Array, " B"], labels: Int[Array, " B"] | None) -> Float[Array, "B D"]:
        """The embedding of t, with that of the labels added."""
        if (labels is None) != (self.num_labels == 0):
            given = "no labels" if labels is None else "labels"
            raise ValueError(
                f"got {given} for a network of num_labels={self.num_labels}; give labels where it is not 0"
            )
        temb = timestep_embedding(t, self.ch)
        temb = dense(4 * self.ch, name="temb_dense0", dtype=self.dtype)(temb)
        temb = dense(4 * self.ch, name="temb_dense1", dtype=self.dtype)(nn.swish(temb))
        if labels is not None:
            # Added here, and drawn from N(0, 1), as by Dhariwal & Nichol 2021.
            normal = nn.initializers.normal(1.0)
            embedding = nn.Embed(
                self.num_labels, 4 * self.ch, embedding_init=normal, dtype=self.dtype, name="label_embedding"
            )
            temb += embedding(labels)
        return temb

    def _check_size(self, x_t: Float[Array, "B H W C"]) -> None:
        _, H, W, _ = x_t.shape
        factor = 2 ** (len(self.ch_mult) - 1)
        if H % factor or W % factor:
            raise ValueError(
                f"got images of {H}x{W}, expected multiples of {factor} for ch_mult={self.ch_mult}; "
                "use images of another size or fewer levels"
            )
