"""CIFAR-10 from 8x8 to 16x16, on one CPU core within minutes: super-resolution by a condition (docs/conditions.md).

source     SR3 (Saharia et al. 2021), with a small network, fewer diffusion steps and v in place of eps
data       python prepare_data.py tfds:cifar10, or the pictures as a zip file or a folder: --data.source, --train.eval-source
command    python train.py configs/upsample16.py --workdir runs/upsample16
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:cifar10", image_size=16, channels=3, condition="downsample2"),
    model=ModelConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0, groups=8),
    diffusion=DiffusionConfig(T=100, schedule="cosine", prediction="v", variance="fixed_small"),
    train=TrainConfig(
        steps=2000,
        batch_size=32,
        lr=1e-3,
        warmup_steps=200,
        ema_decay=0.999,
        ema_warmup=True,
        flip=True,
        steps_per_dispatch=10,
        log_every=50,
        sample_every=1000,
        save_every=500,
        eval_every=1000,
        eval_source="tfds:cifar10:test",
        eval_images=256,
    ),
)
