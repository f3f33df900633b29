"""CIFAR-10, the paper's recipe (section 4; its run_cifar.py): 35,746,307 parameters, T = 1000, L_simple, fixed_large.

source     Ho, Jain & Abbeel 2020, Table 1, last row: IS 9.46 +- 0.11, FID 3.17, NLL <= 3.75 bits/dim (the paper's figures)
hardware   the paper's: TPU v3-8, 21 steps/s at batch 128, 10.6 hours for 800k steps; not run here
data       python prepare_data.py tfds:cifar10 (or --data.source with a folder or a zip file of the 50,000 pictures)
command    python train.py configs/cifar10.py --workdir runs/cifar10
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:cifar10", image_size=32, channels=3),
    model=ModelConfig(ch=128, ch_mult=(1, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,), dropout=0.1),
    diffusion=DiffusionConfig(T=1000, schedule="linear", beta_start=1e-4, beta_end=0.02, variance="fixed_large"),
    train=TrainConfig(
        steps=800_000,
        batch_size=128,
        lr=2e-4,
        warmup_steps=5000,
        grad_clip=1.0,
        ema_decay=0.9999,
        flip=True,
        steps_per_dispatch=10,
    ),
)
