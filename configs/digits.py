"""Handwritten digits of scikit-learn, 8x8 grey: the demonstration, on a laptop without a network.

source     not in the paper; its method with fewer diffusion steps and a small network
command    python train.py configs/digits.py --workdir runs/digits
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="digits", image_size=8, channels=1),
    model=ModelConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, groups=8),
    diffusion=DiffusionConfig(T=100, schedule="linear", beta_start=1e-3, beta_end=0.2, variance="fixed_small"),
    train=TrainConfig(
        steps=1000,
        batch_size=64,
        lr=3e-3,
        warmup_steps=100,
        ema_decay=0.99,
        ema_warmup=True,
        flip=False,
        steps_per_dispatch=10,
        log_every=100,
        sample_every=1000,
        save_every=500,
    ),
)
