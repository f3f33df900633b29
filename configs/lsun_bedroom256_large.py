"""LSUN bedroom 256x256, the large network, the paper's recipe: 255,677,955 parameters, T = 1000, L_simple, fixed_small.

source     Ho, Jain & Abbeel 2020, Table 3: FID 4.90 (the paper's)
model      192 base channels follow from the paper's 256M parameters; the authors' code does not have this network
hardware   the paper's: TPU v3-8, its speed not given; not run here
data       python prepare_data.py tfds:lsun/bedroom
command    python train.py configs/lsun_bedroom256_large.py --workdir runs/lsun_bedroom256_large
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:lsun/bedroom", image_size=256, channels=3),
    model=ModelConfig(ch=192, ch_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attn_resolutions=(16,), dropout=0.0),
    diffusion=DiffusionConfig(T=1000, schedule="linear", beta_start=1e-4, beta_end=0.02, variance="fixed_small"),
    train=TrainConfig(
        steps=1_150_000,
        batch_size=64,
        lr=2e-5,
        warmup_steps=5000,
        grad_clip=1.0,
        ema_decay=0.9999,
        flip=False,  # the paper does not flip bedrooms
    ),
)
