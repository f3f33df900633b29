"""CIFAR-10 at 16x16, on one CPU core within hours.

source     not in the paper; its method with a small network, fewer diffusion steps and v in place of eps
data       python prepare_data.py tfds:cifar10, or the pictures as a zip file or a folder: --data.source, --train.eval-source
command    python train.py configs/cifar10_small.py --workdir runs/cifar10_small
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:cifar10", image_size=16, channels=3),
    model=ModelConfig(ch=48, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0, groups=8),
    diffusion=DiffusionConfig(T=200, schedule="cosine", prediction="v", variance="fixed_small"),
    train=TrainConfig(
        steps=12_000,
        batch_size=32,
        lr=1e-3,
        warmup_steps=200,
        ema_decay=0.9995,
        ema_warmup=True,
        flip=True,
        steps_per_dispatch=10,
        log_every=50,
        sample_every=1500,
        save_every=500,
        eval_every=1500,
        eval_source="tfds:cifar10:test",
        eval_images=256,
    ),
)
