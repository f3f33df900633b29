"""scikit-learn's 8x8 digits with their classes, and guidance: the demonstration of configs/digits.py, digit by digit.

source     Ho & Salimans 2021 (classifier-free guidance); 1,797 images, no download
hardware   2 CPU cores, about two minutes
command    python train.py configs/digits_classes.py --workdir runs/digits_classes, then
           python sample.py runs/digits_classes --num-images 512 --guidance 2
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="digits", image_size=8, channels=1),
    model=ModelConfig(
        ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0, groups=8, num_classes=10
    ),
    diffusion=DiffusionConfig(T=100, schedule="linear", beta_start=1e-3, beta_end=0.2, variance="fixed_small"),
    train=TrainConfig(
        steps=1000,
        batch_size=64,
        lr=3e-3,
        warmup_steps=100,
        ema_decay=0.99,
        ema_warmup=True,
        label_dropout=0.1,
        flip=False,
        steps_per_dispatch=10,
        log_every=100,
        sample_every=1000,
        save_every=500,
    ),
)
