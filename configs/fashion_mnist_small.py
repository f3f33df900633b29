"""Fashion-MNIST's clothes, 28x28 grey, on one CPU core within hours, without TensorFlow.

source     not in the paper; its method with a small network, fewer diffusion steps and v in place of eps
data       train-images-idx3-ubyte.gz and the three other files of https://github.com/zalandoresearch/fashion-mnist, or of
           Debian's package dataset-fashion-mnist, in the folder data/fashion_mnist
command    python train.py configs/fashion_mnist_small.py --workdir runs/fashion_mnist_small
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    data=DataConfig(source="data/fashion_mnist/train-images-idx3-ubyte.gz", image_size=28, channels=1),
    model=ModelConfig(ch=24, ch_mult=(1, 2, 3), num_res_blocks=1, attn_resolutions=(7,), dropout=0.0, groups=8),
    diffusion=DiffusionConfig(T=200, schedule="cosine", prediction="v", variance="fixed_small"),
    train=TrainConfig(
        steps=12_000,
        batch_size=32,
        lr=1e-3,
        warmup_steps=200,
        ema_decay=0.9995,
        ema_warmup=True,
        flip=False,  # its shoes all point to the left
        steps_per_dispatch=10,
        log_every=50,
        sample_every=1500,
        save_every=500,
        eval_every=1500,
        eval_source="data/fashion_mnist/t10k-images-idx3-ubyte.gz",
        eval_images=256,
    ),
)
