"""The model card of an exported run: description, usage and results."""

import json

import jax
from etils import epath

from ddpm_jax import config as configs
from ddpm_jax.evaluation.results import results_of_step
from ddpm_jax.training.workdir import Run

_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, ddpm_jax]
---
# {title}

A denoising diffusion probabilistic model (Ho, Jain & Abbeel 2020) of {size}x{size} images with {channels} channel(s), exported
by ddpm_jax: {which} of step {step}, {count:,} of them.

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
    """The card in Markdown. It lists the workdir's results of the same step and kind of parameters."""
    results = results_of_step(epath.Path(workdir), run.step, weights)
    rows = [f"| {' | '.join(result)} |" for result in results]
    return _CARD.format(
        title=title,
        size=run.config.data.image_size,
        channels=run.config.data.channels,
        which="the moving average of the parameters" if weights == "ema" else "the parameters",
        step=run.step,
        count=sum(array.size for array in jax.tree.leaves(run.params)),
        T=run.config.diffusion.T,
        evaluation="\n".join(["| metric | value | of |", "|---|---|---|", *rows]) if rows else "Not evaluated.",
        config=json.dumps(configs.to_json(run.config), indent=2),
    )
