"""Your own pictures at 64x64 on a GPU: any folder (or zip file) of PNG, JPEG, WebP or BMP pictures, of any sizes and shapes.

source     not in the paper; its method with the CIFAR-10 network one level deeper, and no expected number
hardware   not run here; on a laptop's CPU a step takes half a minute: use folder_small.py there
data       --data.source with the folder; check it first: python prepare_data.py FOLDER --check
command    python train.py configs/folder.py --workdir runs/mine --data.source FOLDER
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="FOLDER", image_size=64, channels=3),
    model=ModelConfig(ch=128, ch_mult=(1, 2, 2, 2, 2), num_res_blocks=2, attn_resolutions=(16,), dropout=0.1),
    diffusion=DiffusionConfig(T=1000, schedule="linear", beta_start=1e-4, beta_end=0.02, variance="fixed_large"),
    train=TrainConfig(
        steps=50_000,
        batch_size=64,
        lr=1e-4,
        warmup_steps=500,
        ema_decay=0.9999,
        ema_warmup=True,
        flip=True,  # --train.no-flip for what must not be mirrored, as writing
        sample_every=1000,
        save_every=1000,
    ),
)
