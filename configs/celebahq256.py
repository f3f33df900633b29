"""CelebA-HQ 256x256, the paper's recipe: 113,673,219 parameters, T = 1000, L_simple, fixed_small.

source     Ho, Jain & Abbeel 2020, Figure 1 shows samples; no FID given
hardware   the paper's: TPU v3-8, 2.2 steps/s at batch 64; not run here
data       python prepare_data.py tfds:celeb_a_hq/256, which says where to put its archive first
command    python train.py configs/celebahq256.py --workdir runs/celebahq256
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:celeb_a_hq/256", image_size=256, channels=3),
    model=ModelConfig(ch=128, ch_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attn_resolutions=(16,), dropout=0.0),
    diffusion=DiffusionConfig(T=1000, schedule="linear", beta_start=1e-4, beta_end=0.02, variance="fixed_small"),
    train=TrainConfig(
        steps=500_000,
        batch_size=64,
        lr=2e-5,
        warmup_steps=5000,
        grad_clip=1.0,
        ema_decay=0.9999,
        flip=True,
    ),
)
