"""How images are drawn and written: options, which are known before JAX is imported."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.options import Bounds, Choices

LAST_IMAGE = 2 * 10**9  # indices are int32; this leaves room for a batch
Format = Literal["both", "png", "npz", "npy", "shards"]
SAMPLER = Choices("ddpm_jax.sampling:SAMPLERS", "ancestral", "ddim", "dpm++1s", "dpm++2m", "dpm++3m", "heun")
SPACING = Choices("ddpm_jax.sampling.spacing:SPACINGS", "linspace", "leading", "trailing", "quadratic", "logsnr")
GIVEN = tyro.conf.arg(metavar="PICTURES", help_behavior_hint="(default: none)")
ANIMATION = PrimitiveConstructorSpec[str](  # --animation alone is WebP
    nargs=(0, 1),
    metavar="[{webp,gif}]",
    choices=("none", "webp", "gif"),
    instance_from_str=lambda words: words[0] if words else "webp",
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
)


@dataclass(frozen=True)
class SamplerOptions:
    """How images are drawn; the defaults are the paper's Algorithm 2 over all T steps."""

    sampler: Annotated[str, SAMPLER] = "ancestral"
    """Method; ancestral is the paper's Algorithm 2."""
    steps: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(metavar="INT [INT ...]", help_behavior_hint="(default: all)")
    ] = None
    """How many of the T steps to visit, or so many in each of equal sections, e.g. 10 15 25."""
    spacing: Annotated[str, SPACING] = "linspace"
    """Which steps are visited, where not all are."""
    eta: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 0)")] = None
    """Noise of ddim, from 0 (none) to 1 (ancestral)."""
    clip: Literal["static", "dynamic", "none"] = "static"
    """Clip each predicted x_0 to [-1, 1], threshold it at its 99.5 % quantile, or leave it."""
    labels: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="CLASS ...|all|one-per-row|FILE", help_behavior_hint="(default: all)")
    ] = ()
    """Of a run with classes: numbers or names that the images take in turn, all in turn, one class for each row of eight, or a
    file of one on each line. Evaluation takes the classes of the real images unless told otherwise."""
    guidance: float = 1.0
    """1 draws from the class, more makes it plainer and the images more alike, 0 ignores it."""
    guidance_interval: Annotated[
        tuple[int, int] | None, tyro.conf.arg(metavar="T T", help_behavior_hint="(default: all)")
    ] = None
    """First and last t at which guidance acts."""
    guidance_rescale: float = 0.0
    """Share, 0 to 1, by which guided outputs are brought back to the contrast of unguided ones; 0.7 is usual."""
    guide_with: Annotated[str, tyro.conf.arg(metavar="WORKDIR", help_behavior_hint="(default: no class)")] = ""
    """Another run, a smaller or less trained one, from whose output guidance leads away."""

    def definition(self) -> dict[str, Any]:
        """The options that the images of a run without classes depend on, by name; guidance only if there is some."""
        unguided = ("guidance", "guidance_interval", "guidance_rescale") if self.guidance == 1 else ()
        return {name: value for name, value in vars(self).items() if name not in ("labels", "guide_with", *unguided)}


@dataclass(frozen=True)
class GivenOptions:
    """Pictures that images are drawn from: folders, zip files, arrays, as data.source names them, or single pictures.

    Image i takes picture i, and they begin again after the last.
    """

    conditions: Annotated[str, GIVEN] = ""
    """Of a run with data.condition: the conditions, a smaller or a grey picture say; of each one image is drawn, or more with
    --num-images."""
    from_images: Annotated[str, GIVEN] = ""
    """Pictures that are noised to --noise-level and denoised again (SDEdit, Meng et al. 2022)."""
    inpaint: Annotated[str, GIVEN] = ""
    """Pictures that are filled in where --mask is black, by ancestral sampling (RePaint, Lugmayr et al. 2022)."""
    mask: Annotated[str, GIVEN] = ""
    """One mask for all pictures, or one for each in their order, of the run's size: white (255) where a picture is kept, and
    black (0) where it is filled in."""
    interpolate: Annotated[
        tuple[str, str] | None, tyro.conf.arg(metavar="PICTURE PICTURE", help_behavior_hint="(default: none)")
    ] = None
    """Two pictures, or numbers of images of the run's data, between which --num-images images lie: both are noised to
    --noise-level, mixed and denoised (the paper's Figure 8)."""
    noise_level: float = 0.5
    """Of --from-images and --interpolate: the share of the T steps of noise, above 0 to 1; less stays closer to the pictures."""
    inpaint_jump: Annotated[int, Bounds(1)] = 10
    """Of --inpaint: steps that the chain is noised back by, so that what is filled in fits what is kept."""
    inpaint_times: Annotated[int, Bounds(1)] = 10
    """Of --inpaint: how often each part of the chain is run; 1 is never back, and the time grows with it."""


STARTS = ("from_images", "inpaint", "interpolate")
NEEDS = {
    "noise_level": ("from_images", "interpolate"),
    "inpaint_jump": ("inpaint",),
    "inpaint_times": ("inpaint",),
}  # options, and those that they are of


def check_given(given: GivenOptions) -> None:
    """Raises UsageError for options that exclude each other, or that have no effect."""
    chosen = [f"--{name.replace('_', '-')}" for name in STARTS if getattr(given, name)]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other; give one of them")
    if bool(given.inpaint) != bool(given.mask):
        raise UsageError("--inpaint and --mask go together; give both")
    if not 0 < given.noise_level <= 1:
        raise UsageError(
            f"--noise-level {given.noise_level:g} is outside of 0 to 1; give a share of the steps, 0.5 say"
        )
    for name, needs in NEEDS.items():
        if getattr(given, name) != getattr(GivenOptions(), name) and not any(getattr(given, need) for need in needs):
            options = " or ".join(f"--{need.replace('_', '-')}" for need in needs)
            raise UsageError(f"--{name.replace('_', '-')} has no effect without {options}; leave it out, or give one")
