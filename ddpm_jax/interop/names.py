"""One table of the parameters' names: here, in diffusers and in the authors' TensorFlow checkpoints.

    here               down_1_attn_0/q/kernel                       (C, D)   and (3, 3, C, D) of a convolution
    diffusers          down_blocks.1.attentions.0.to_q.weight       (D, C)   and (D, C, 3, 3), 1x1 shortcuts (D, C, 1, 1)
    older diffusers    down_blocks.1.attentions.0.query.weight      as in diffusers
    TensorFlow         model/down_1/attn_0/q/W                      as here

It is derived from the config's network, so it holds every parameter exactly once.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np

from ddpm_jax.core.errors import UsageError
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.parameters import flatten
from ddpm_jax.training.step import abstract_state

_BLOCK = re.compile(r"(down|mid|up)_(?:(\d+)_)?(block|attn|downsample|upsample)_?(\d*)")  # part, level, what, index
_DIFFUSERS = {
    "temb_dense0": "time_embedding.linear_1",
    "temb_dense1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "label_embedding": "class_embedding",
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_DIFFUSERS_OLD = _DIFFUSERS | {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


@dataclass(frozen=True)
class Parameter:
    """One array of the network: its path and shape here, and its names elsewhere."""

    path: str
    shape: tuple[int, ...]
    tensorflow: str
    diffusers: str
    diffusers_old: str

    @property
    def diffusers_shape(self) -> tuple[int, ...]:
        """Its shape in PyTorch."""
        return self.to_diffusers(np.broadcast_to(np.float32(0), self.shape)).shape

    def to_diffusers(self, array: np.ndarray) -> np.ndarray:
        """The array in PyTorch's layout (a view): outputs first, window last."""
        if self._is_table:
            return array
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        return array.T[:, :, None, None] if self._is_shortcut else array.T

    def from_diffusers(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_diffusers`."""
        if self._is_table:
            return array
        if self._is_shortcut:
            return array[:, :, 0, 0].T
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T

    @property
    def _is_table(self) -> bool:
        return self.path.endswith("/embedding")

    @property
    def _is_shortcut(self) -> bool:
        return self.path.endswith("nin_shortcut/kernel")


@functools.cache
def parameters(experiment: Experiment) -> tuple[Parameter, ...]:
    """All parameters of the experiment's U-Net, from shapes alone. Raises UsageError for another network."""
    if experiment.has_own_network:
        raise UsageError(
            f"diffusers and the authors' code have no {type(experiment.network).__name__}, only the U-Net; export the run to a "
            ".safetensors or .jax_export file instead"
        )
    shapes = abstract_state(experiment).params
    levels = len(experiment.config.model.ch_mult)
    return tuple(
        Parameter(
            path=path,
            shape=leaf.shape,
            tensorflow=_tensorflow(path),
            diffusers=_diffusers(path, levels, _DIFFUSERS),
            diffusers_old=_diffusers(path, levels, _DIFFUSERS_OLD),
        )
        for path, leaf in flatten(shapes).items()
    )


def _tensorflow(path: str) -> str:
    module, *layer, kind = path.split("/")
    if block := _BLOCK.fullmatch(module):
        part, level, what, index = block.groups()
        module = f"{part}/" if level is None else f"{part}_{level}/"
        module += f"{what}_{index}" if index else f"{what}/conv"
    module = module.replace("temb_", "temb/")
    of_norm = [module, *layer][-1].startswith("norm")
    # The authors' networks have no classes, so nothing of theirs is called as an embedding is here.
    name = {"kernel": "W", "embedding": "W", "scale": "gamma", "bias": "beta" if of_norm else "b"}[kind]
    return "/".join(["model", module, *layer, name])


def _diffusers(path: str, levels: int, names: dict[str, str]) -> str:
    module, *layer, kind = path.split("/")
    if block := _BLOCK.fullmatch(module):
        part, level, what, index = block.groups()
        if part == "mid":
            module, index = "mid_block", str(int(index) - 1)  # ours count from 1, like the authors'
        else:  # diffusers counts the levels of the way up from the lowest resolution
            module = f"{part}_blocks.{level if part == 'down' else levels - 1 - int(level)}"
        module += {
            "block": f".resnets.{index}",
            "attn": f".attentions.{index}",
            "downsample": ".downsamplers.0.conv",
            "upsample": ".upsamplers.0.conv",
        }[what]
    return ".".join([*(names.get(name, name) for name in (module, *layer)), "bias" if kind == "bias" else "weight"])
