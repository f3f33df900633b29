"""The model card of an exported run: description, usage and results."""

import json

import jax
from etils import epath

from ddpm_jax.config import DataConfig, to_json
from ddpm_jax.evaluation.metrics import step_of, weights_of
from ddpm_jax.evaluation.results import describe, made_of, read_results
from ddpm_jax.training.workdir import Run

_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, ddpm_jax]
---
# {title}

A denoising diffusion probabilistic model (Ho, Jain & Abbeel 2020) of {height}x{width} images with {channels} channel(s), exported
by ddpm_jax: {which} of step {step}, {count:,} of them.

```python
from diffusers import DDPMPipeline
images = DDPMPipeline.from_pretrained("this folder")(batch_size=4, num_inference_steps={T}{as_arrays}).images
```
{scale}
## Evaluation

{evaluation}

## Config

```json
{config}
```
"""


def _scale(data: DataConfig) -> str:
    """What the pipeline's values stand for, where they are not those of 8-bit images."""
    if data.value_range is None:
        return ""
    low, high = data.value_range
    return f"\nThe images are float32 in [0, 1], which stands for values from {low:g} to {high:g}.\n"


def _which(weights: str) -> str:
    """The parameters in words."""
    average = "the moving average of the parameters"
    return {"ema": average, "raw": "the parameters"}.get(weights, f"{average} ({weights})")


def model_card(run: Run, workdir: epath.PathLike, *, title: str) -> str:
    """The card in Markdown. It lists the workdir's results of the same step and kind of parameters."""
    rows = [
        f"| {result['metric']} | {describe(result)} | {made_of(result)} |"
        for result in read_results(epath.Path(workdir))[0]
        if (step_of(result), weights_of(result)) == (run.step, run.weights)
    ]
    return _CARD.format(
        title=title,
        height=run.config.data.size[0],
        width=run.config.data.size[1],
        channels=run.config.data.channels,
        which=_which(run.weights),
        step=run.step,
        count=sum(array.size for array in jax.tree.leaves(run.params)),
        T=run.config.diffusion.T,
        as_arrays="" if run.experiment.makes_pictures else ', output_type="np"',
        scale=_scale(run.config.data),
        evaluation="\n".join(["| metric | value | of |", "|---|---|---|", *rows]) if rows else "Not evaluated.",
        config=json.dumps(to_json(run.config), indent=2),
    )
