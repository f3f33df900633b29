"""The same work in PyTorch with diffusers (extra `parity`): its U-Net with the config's layers, random weights, its schedulers.

On a GPU the network is compiled and channels-last, Adam is fused, cuDNN tries which convolutions are fastest, and float32
products may use TF32, as in JAX. On CPU the network is channels-last, and not compiled.
"""

from collections.abc import Callable
from typing import Any

import jax

from ddpm_jax.config import Config
from ddpm_jax.core.errors import UsageError, import_extra
from ddpm_jax.interop.diffusers_config import PREDICTIONS, unet_config
from ddpm_jax.training.experiment import Experiment

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ancestral": ("DDPMScheduler", {"clip_sample": True}),
    "ddim": ("DDIMScheduler", {"clip_sample": True}),
    "dpm++1s": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
}


def libraries() -> tuple[Any, Any]:
    """Imports (torch, diffusers). Raises UsageError if one is missing, or PyTorch cannot use the GPU that JAX uses."""
    diffusers, torch = (import_extra(name, "parity", "--peer torch") for name in ("diffusers", "torch"))
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        raise UsageError(
            "JAX runs on a GPU that this PyTorch cannot use; install PyTorch for CUDA, or set JAX_PLATFORMS=cpu"
        )
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = _device() == "cuda"
    return torch, diffusers


def find_scheduler(config: Config, sampler: str) -> tuple[str, dict[str, Any]]:
    """The class and options of a sampler's counterpart. Raises UsageError if diffusers has none."""
    if sampler not in SCHEDULERS or config.diffusion.prediction not in PREDICTIONS:
        raise UsageError(
            f"--peer torch has no counterpart of sampler {sampler} with diffusion.prediction="
            f"{config.diffusion.prediction}; it has {', '.join(SCHEDULERS)} with {', '.join(PREDICTIONS)}"
        )
    return SCHEDULERS[sampler]


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def build_network(experiment: Experiment, dtype: str = "float32") -> Any:
    """diffusers' UNet2DModel with the layers of the experiment's network and random weights, on the device."""
    torch, diffusers = libraries()
    network = diffusers.UNet2DModel.from_config(unet_config(experiment))
    return network.to(_device(), getattr(torch, dtype), memory_format=torch.channels_last)


def compiled(network: Any, mode: str) -> Callable[..., Any]:
    """The network as it is called: on a GPU compiled by torch.compile in this mode."""
    torch, _ = libraries()
    if _device() == "cpu":
        return network
    program = torch.compile(network, mode=mode)

    def call(*arguments):
        torch.compiler.cudagraph_mark_step_begin()  # what the call before has returned is no longer needed
        return program(*arguments)

    return call


def _images(torch: Any, config: Config, batch: int) -> Any:
    x = torch.randn(batch, config.data.channels, *config.data.size, device=_device())
    return x.to(memory_format=torch.channels_last)


def sampling(
    experiment: Experiment, sampler: str, steps: int, batch: int, *, mode: str = "default"
) -> Callable[[], Any]:
    """Returns a call that samples `batch` uint8 images in `steps` steps. mode: of `compiled`."""
    config = experiment.config
    torch, diffusers = libraries()
    name, options = find_scheduler(config, sampler)
    scheduler = getattr(diffusers, name)(
        num_train_timesteps=config.diffusion.T,
        trained_betas=experiment.process.schedule.betas,
        prediction_type=PREDICTIONS[config.diffusion.prediction],
        **options,
    )
    network = build_network(experiment, config.model.dtype).eval().requires_grad_(False)
    evaluate = compiled(network, mode)

    def call():
        with torch.inference_mode():
            x = _images(torch, config, batch)
            scheduler.set_timesteps(steps)
            for t, t_there in zip(scheduler.timesteps, scheduler.timesteps.to(x.device), strict=True):
                output = evaluate(x.to(network.dtype), t_there).sample[:, : config.data.channels]
                x = scheduler.step(output.float(), t, x).prev_sample
            return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    return call


def training(experiment: Experiment, *, mode: str = "default") -> Callable[[], Any]:
    """Returns a call of train.steps_per_dispatch steps of Algorithm 1: Adam, gradient clipping, EMA; bfloat16 by autocast.

    mode: of `compiled`.
    """
    config = experiment.config
    torch, _ = libraries()
    network = build_network(experiment).train()
    evaluate, parameters = compiled(network, mode), list(network.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=config.train.lr, fused=_device() == "cuda")
    alphas_cumprod = torch.tensor(experiment.process.schedule.alphas_cumprod, dtype=torch.float32, device=_device())
    batch, bfloat16 = config.train.batch_size, config.model.dtype == "bfloat16"

    def step(x_0):
        t, eps = torch.randint(config.diffusion.T, (batch,), device=_device()), torch.randn_like(x_0)
        a = alphas_cumprod[t][:, None, None, None]
        optimizer.zero_grad()  # before the network's graph writes over what the gradients lie in
        with torch.autocast(_device(), torch.bfloat16, enabled=bfloat16):
            output = evaluate(a.sqrt() * x_0 + (1 - a).sqrt() * eps, t).sample[:, : config.data.channels]
        torch.nn.functional.mse_loss(output.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.grad_clip)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - config.train.ema_decay)

    def call():
        for _ in range(config.train.steps_per_dispatch):
            step(_images(torch, config, batch))
        if _device() == "cuda":
            torch.cuda.synchronize()

    return call
