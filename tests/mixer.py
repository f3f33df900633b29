"""A network of one's own: an MLP-mixer of patches, which knows nothing of ddpm_jax. As a script, it trains: mixer.py WORKDIR."""

import sys

import jax.numpy as jnp
from flax import linen as nn


class Mixer(nn.Module):
    """Patches of 2x2 pixels, mixed over places and over channels in turn; t enters as an offset of every channel."""

    width: int = 16
    depth: int = 2

    @nn.compact
    def __call__(self, x_t, t):
        B, H, W, C = x_t.shape
        h = x_t.reshape(B, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, H * W // 4, 4 * C)
        h = nn.Dense(self.width)(h)
        frequencies = 10.0 ** -jnp.linspace(0, 2, self.width // 2, dtype=jnp.float32)
        angles = t[:, None].astype(jnp.float32) * frequencies[None, :]
        h = h + nn.Dense(self.width)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))[:, None, :]
        for _ in range(self.depth):
            over_places = nn.LayerNorm()(h).swapaxes(1, 2)
            h = h + nn.Dense(h.shape[1])(nn.gelu(nn.Dense(2 * h.shape[1])(over_places))).swapaxes(1, 2)
            h = h + nn.Dense(self.width)(nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(h))))
        h = nn.Dense(4 * C)(h)
        return h.reshape(B, H // 2, W // 2, 2, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)


def train_mixer(workdir, steps=24):
    """Trains the mixer on the digits."""
    from tiny import one_device, tiny

    from ddpm_jax import Experiment, train

    config = tiny(train={"steps": steps, "save_every": 4, "log_every": 4, "sample_every": 12})
    return train(Experiment.from_config(config, network=Mixer()), workdir, mesh=one_device())


if __name__ == "__main__":
    train_mixer(sys.argv[1])
