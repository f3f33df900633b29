"""MNIST's handwritten digits, 28x28 grey, with a network of a quarter of CIFAR-10's size.

source     not in the paper; its method with a smaller network, and no expected number
hardware   not run here
data       python prepare_data.py tfds:mnist
command    python train.py configs/mnist.py --workdir runs/mnist
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="tfds:mnist", image_size=28, channels=1),
    model=ModelConfig(ch=64, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(14,), dropout=0.1),
    diffusion=DiffusionConfig(T=1000, schedule="linear", beta_start=1e-4, beta_end=0.02, variance="fixed_large"),
    train=TrainConfig(
        steps=50_000,
        batch_size=128,
        lr=2e-4,
        warmup_steps=1000,
        ema_decay=0.999,
        ema_warmup=True,
        flip=False,  # a mirrored digit is none
        steps_per_dispatch=10,
    ),
)
