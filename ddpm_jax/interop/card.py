"""The model card of an exported run: what it is, how to sample from it, and how good it was found to be."""

import json
from typing import Any

import jax
from etils import epath

from ddpm_jax import config as configs
from ddpm_jax.errors import UsageError
from ddpm_jax.workdir import Run

_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, ddpm_jax]
---
# {title}

A denoising diffusion probabilistic model (Ho, Jain & Abbeel 2020) of {size}x{size} images with {channels} channel(s), trained
with ddpm_jax: {which} of step {step}, {count:,} of them.

```python
from diffusers import DDPMPipeline
images = DDPMPipeline.from_pretrained("this folder")(batch_size=4, num_inference_steps={T}).images
```

## Evaluation

{evaluation}

## Config

```json
{config}
```
"""


def model_card(run: Run, workdir: epath.PathLike, *, weights: str, title: str) -> str:
    """The card in Markdown, with the results of evaluating the workdir if weights are the "ema" that was evaluated."""
    results = _evaluation_results(epath.Path(workdir), run.step) if weights == "ema" else {}
    rows = [f"| {name} | {value} |" for name, value in results.items()]
    return _CARD.format(
        title=title,
        size=run.config.data.image_size,
        channels=run.config.data.channels,
        which="the moving average of the parameters" if weights == "ema" else "the parameters",
        step=run.step,
        count=sum(array.size for array in jax.tree.leaves(run.params)),
        T=run.config.diffusion.T,
        evaluation="\n".join(["| result | value |", "|---|---|", *rows]) if rows else "Not evaluated.",
        config=json.dumps(configs.to_json(run.config), indent=2),
    )


def _evaluation_results(workdir: epath.Path, step: int) -> dict[str, Any]:
    """The numbers and words of those files `WORKDIR/evaluation/*.json` that are of this step: {"fid.fid": 3.2, ...}."""
    results: dict[str, Any] = {}
    for path in sorted((workdir / "evaluation").glob("*.json")):
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} cannot be read ({error}); evaluate again, or move it away") from None
        if isinstance(values, dict) and values.get("step") == step:
            results |= {f"{path.stem}.{k}": v for k, v in values.items() if isinstance(v, (str, int, float))}
    return results
