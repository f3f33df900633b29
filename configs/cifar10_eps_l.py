"""CIFAR-10, an ablation of Table 2: eps prediction, L, fixed isotropic variance; all else as in cifar10.py.

source     Ho, Jain & Abbeel 2020, Table 2: IS 7.67, FID 13.51, NLL <= 3.70 bits/dim (the paper's); its last row is cifar10.py
hardware   not run here
data       python prepare_data.py tfds:cifar10
command    python train.py configs/cifar10_eps_l.py --workdir runs/cifar10_eps_l
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, TrainConfig

config = Config(  # the defaults are cifar10.py's recipe
    data=DataConfig(source="tfds:cifar10"),
    diffusion=DiffusionConfig(prediction="eps", variance="fixed_large", loss="vb"),
    train=TrainConfig(steps_per_dispatch=10),
)
