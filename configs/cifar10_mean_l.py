"""CIFAR-10, an ablation of Table 2: mean prediction, L, fixed isotropic variance; all else as in cifar10.py.

source     Ho, Jain & Abbeel 2020, Table 2: IS 8.06, FID 13.22 (the paper's); its last row is cifar10.py
hardware   not run here
data       python prepare_data.py tfds:cifar10
command    python train.py configs/cifar10_mean_l.py --workdir runs/cifar10_mean_l
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, TrainConfig

config = Config(  # the defaults are cifar10.py's recipe
    data=DataConfig(source="tfds:cifar10"),
    diffusion=DiffusionConfig(prediction="x_prev", variance="fixed_large", loss="vb"),
    train=TrainConfig(steps_per_dispatch=10),
)
