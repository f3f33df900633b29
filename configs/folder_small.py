"""Your own photos at 32x32 on a laptop: first pictures within minutes, a run of less than half an hour on two cores.

source     not in the paper; its method with a small network, fewer diffusion steps and v in place of eps
hardware   two x86 cores, 300 photos: 30 minutes beside other work (docs/photos.md)
command    python train.py FOLDER --workdir runs/mine, which also chooses size and channels by the pictures, or
           python train.py configs/folder_small.py --workdir runs/mine --data.source FOLDER
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="FOLDER", image_size=32, channels=3),
    model=ModelConfig(ch=24, ch_mult=(1, 2, 4, 4), num_res_blocks=1, attn_resolutions=(8,), dropout=0.0, groups=8),
    # In a run this short eps leaves colour casts: its errors at large t grow by 1 / sqrt(alphas_cumprod), those of v do not.
    diffusion=DiffusionConfig(T=200, schedule="cosine", prediction="v", variance="fixed_small"),
    train=TrainConfig(
        steps=5000,
        batch_size=16,
        lr=1e-3,
        warmup_steps=100,
        ema_decay=0.999,
        ema_warmup=True,
        flip=True,  # --train.no-flip for what must not be mirrored, as writing
        steps_per_dispatch=10,
        log_every=50,
        sample_every=500,
        num_samples=16,
        save_every=500,
    ),
)
