"""Algorithm 1 in PyTorch: diffusers' network, noise, EMA and sampler, PyTorch's Adam and clipping.

It imports nothing of ddpm_jax. It is told the network and the scheduler in diffusers' fields, the training options and the
images.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import nn

ZERO = ("conv2", "to_out.0", "conv_out")  # layers that start as nearly zero
NEARLY_ZERO = 1e-5  # their gain: the square root of the paper's scale, 1e-10


def initialise(network: nn.Module) -> None:
    """Draws the weights as the paper's code does: uniform with the variance 1 / fan_avg, biases 0. PyTorch's default differs."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=NEARLY_ZERO if name.endswith(ZERO) else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def places(count: int, size: int) -> Iterator[torch.Tensor]:
    """Batches of places of `count` images without end: all of them in a new order, again and again."""
    waiting = torch.empty(0, dtype=torch.int64)
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(count)])
        batch, waiting = waiting[:size], waiting[size:]
        yield batch


class Training:
    """A network that is trained, with its optimizer and EMA.

    Args:
        unet: The config of a `UNet2DModel`.
        scheduler: The config of a `DDPMScheduler`.
        options: batch_size, lr, warmup_steps, adam_b1, adam_b2, adam_eps, grad_clip, ema_decay, ema_warmup and flip.
        seed: Of the initial weights and all draws of the training.
    """

    def __init__(self, unet: dict[str, Any], scheduler: dict[str, Any], options: dict[str, Any], seed: int):
        torch.manual_seed(seed)
        self.options, self.seed = options, seed
        self.network = UNet2DModel.from_config(unet).train()
        initialise(self.network)
        self.parameters = list(self.network.parameters())
        self.scheduler = DDPMScheduler.from_config(scheduler)
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=options["lr"],
            betas=(options["adam_b1"], options["adam_b2"]),
            eps=options["adam_eps"],
        )
        warmup = max(options["warmup_steps"], 1)
        self.warmup = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(step / warmup, 1.0))
        decay = options["ema_decay"]
        # Its decays are (1 + n) / (10 + n) up to `decay`, and at least min_decay.
        self.ema = EMAModel(self.parameters, decay=decay, min_decay=0.0 if options["ema_warmup"] else decay)

    def losses(self, images: np.ndarray) -> Iterator[float]:
        """The loss of each further step. images: all training images, uint8 (N, H, W, C)."""
        x_0 = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        for batch in places(len(x_0), self.options["batch_size"]):
            some = x_0[batch]
            if self.options["flip"]:
                some = torch.where(torch.rand(len(some), 1, 1, 1) < 0.5, some.flip(-1), some)
            t = torch.randint(self.scheduler.config.num_train_timesteps, (len(some),))
            yield self.step(some, t, torch.randn_like(some))

    def step(self, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> float:
        """One step of Algorithm 1 with these draws; returns the loss before it. x_0, eps: (B, C, H, W); t: (B,)."""
        x_t = self.scheduler.add_noise(x_0, eps, t)
        loss = nn.functional.mse_loss(self.network(x_t, t).sample, eps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.options["grad_clip"])
        self.optimizer.step()
        self.warmup.step()
        self.ema.step(self.parameters)
        return loss.item()

    def pipeline(self, weights: str) -> Any:
        """diffusers' `DDPMPipeline` with a copy of the weights: "ema" or "raw"."""
        network = copy.deepcopy(self.network).eval()
        if weights == "ema":
            self.ema.copy_to(network.parameters())
        pipeline: Any = DDPMPipeline(network, self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def samples(self, count: int, batch_size: int = 256) -> np.ndarray:
        """Images drawn with the EMA in all T steps, uint8 (count, H, W, C)."""
        pipeline, generator = self.pipeline("ema"), torch.Generator().manual_seed(self.seed)
        T = self.scheduler.config.num_train_timesteps
        sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        drawn = [
            pipeline(batch_size=size, generator=generator, num_inference_steps=T, output_type="np").images
            for size in sizes
        ]
        return np.round(np.concatenate(drawn) * 255).astype(np.uint8)
