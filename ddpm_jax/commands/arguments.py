"""The command line of each command. Nothing here imports JAX before the line is read, so that help and refusals come at once.

`PARSERS` has a function for each command: the words after its name -> what its `main` is given.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from etils import epath

from ddpm_jax.benchmark.options import DEFAULTS, Plan, check_plan
from ddpm_jax.commands.config_file import are_pictures, load_config, options_of
from ddpm_jax.commands.configs import shipped
from ddpm_jax.config import RANGE, Config, check
from ddpm_jax.core.errors import UsageError, program
from ddpm_jax.core.options import LAST_SEED, Bounds, Flag, check_bounds
from ddpm_jax.evaluation.options import METRIC, Options, Preprocessing, check_options
from ddpm_jax.generation.options import ANIMATION, LAST_IMAGE, Format, GivenOptions, SamplerOptions, check_given
from ddpm_jax.training.config_json import read_config
from ddpm_jax.training.weights import WEIGHTS


def shown(metavar: str, default: str = "") -> Any:
    """How an option's value is called in the help, and its default where words say it better than the value."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else None)


Positional = tyro.conf.Positional[str]
Step = Annotated[int | Literal["best"] | None, shown("STEP|best", "the newest")]


@dataclass(frozen=True)
class Train:
    """Train a diffusion model. The same command resumes the run."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    workdir: Annotated[str, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(required)")] = ""
    """Folder that the run is written to."""
    distributed: Flag = False
    """Join the other processes of a multi-host run (see docs/parallelism.md)."""
    unverified: Flag = False
    """Resume from the newest checkpoint even if its manifest is missing or does not match."""
    changed_data: Flag = False
    """Resume although the data set has changed since the checkpoint, e.g. after a bad picture was replaced or skipped."""


@dataclass(frozen=True)
class Parameters:
    """Which parameters of the run."""

    weights: Annotated[str, WEIGHTS] = "ema"
    """The moving average of the parameters, the parameters themselves, or another average: ema:0.999 is one of
    train.ema_decays, width:0.15 is rebuilt from a run with train.ema_widths (docs/training.md)."""
    step: Step = None
    """The checkpoint's step, or best, by train.keep_best."""
    unverified: Flag = False
    """Use the checkpoint even if its manifest is missing or does not match."""


ParametersGroup = Annotated[Parameters, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="parameter")]
GivenGroup = Annotated[GivenOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="picture")]
SamplerGroup = Annotated[SamplerOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="sampler")]


@dataclass(frozen=True)
class Sample:
    """Sample images from a run. The same command resumes an incomplete set."""

    workdir: Annotated[Positional, shown("WORKDIR")]
    """Folder of the run; or pretrained:NAME, such as pretrained:digits, or a file that convert export made."""
    num_images: Annotated[int | None, Bounds(1, LAST_IMAGE), shown("INT", "64, or one for each picture given")] = None
    """Number of images; image i of a seed does not depend on it, except with --interpolate."""
    first_image: Annotated[int, Bounds(0, LAST_IMAGE)] = 0
    """Index of the first image, to make a set in several pieces."""
    seed: Annotated[int, Bounds(0, LAST_SEED)] = 0
    """Seed of every draw, 0 to 4294967295."""
    out: Annotated[str, shown("FOLDER", "WORKDIR/generated/ or generated/NAME/, and a name by step and options")] = ""
    """Folder that the images are written to."""
    format: Annotated[
        Format | None, shown("{both,png,npz,npy,shards}", "both, or npy where PNG cannot hold the images")
    ] = None
    """Single PNGs, one images.npz, both, one images.npy, or one npz shard per batch, for sets too large for one file."""
    animation: Annotated[str, ANIMATION] = "none"
    """Also write the reverse process of the first images, 64 or --batch-size, as OUT/process.webp, or as process.gif, which is
    larger and has 256 colours."""
    batch_size: Annotated[int, Bounds(1)] = 64
    """Images computed together; changes speed only."""
    distributed: Flag = False
    """Join the other processes of a multi-host run (see docs/parallelism.md)."""
    given: GivenGroup = field(default_factory=GivenOptions)
    sampler: SamplerGroup = field(default_factory=SamplerOptions)
    parameters: ParametersGroup = field(default_factory=Parameters)


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run, on its EMA parameters unless told otherwise. The same command resumes an evaluation that was stopped."""

    workdir: Annotated[Positional, shown("WORKDIR")]
    """Folder of the run; results, figures and report.html are written into it."""
    metrics: Annotated[
        tuple[Annotated[str, METRIC], ...],
        tyro.conf.arg(help_behavior_hint="(default: all that the features allow)"),
    ] = ()
    """What is computed. Without Inception weights the default is what needs no features."""
    features: Annotated[str, shown("{inception,pixels}|FILE")] = "inception"
    """Features that compare images: those of Inception-v3, as in papers, raw pixels, or a program of jax.export in a file, such
    as convert classifier makes."""
    preprocessing: Preprocessing = "tensorflow"
    """Resizing and scaling for Inception: as in the original FID, or as in pytorch-fid."""
    figures: bool = True
    """Draw the figures of the report as well; without them it shows the samples that a metric took."""
    distributed: Flag = False
    """Join the other processes of a multi-host run (see docs/parallelism.md)."""
    options: Annotated[Options, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="image")] = field(default_factory=Options)
    sampler: SamplerGroup = field(default_factory=SamplerOptions)
    parameters: ParametersGroup = field(default_factory=Parameters)


@dataclass(frozen=True)
class Benchmark:
    """Measure samplers, the train step and the data feed of a config, or of a run with its parameters."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    plan: Annotated[Plan, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="measurement")] = field(default_factory=Plan)
    compile_for: Annotated[str, shown("TOPOLOGY", "none")] = ""
    """A TPU topology such as v5e:16x16: compile the programs for it, and run nothing (extra `tpu`)."""
    json: Annotated[str, shown("FILE", "none")] = ""
    """JSON file to write the results to as well."""
    against: Annotated[str, shown("FOLDER", "none")] = ""
    """Another checkout of this project, to measure in turn with this version; the command fails where this one is slower."""
    workdir: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""
    """The run, if one is measured."""
    words: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = ()
    """What another version is given for the config."""


@dataclass(frozen=True)
class PrepareData:
    """Download a data set of tensorflow-datasets and write it as array_record, or check the pictures of any source."""

    source: Annotated[Positional, shown("SOURCE")]
    """What data.source takes: tfds:NAME[:split], or with --check a folder or a zip file of pictures."""
    check: Flag = False
    """Decode every picture, and list those that cannot be, for --data.on-bad-image skip."""
    channels: Annotated[int, Bounds(1)] = 3
    """With --check: data.channels of the run."""
    value_range: Annotated[tuple[float, float] | None, RANGE] = None
    """With --check: data.value_range of the run."""
    workers: Annotated[int, Bounds(0)] = 0
    """Threads that decode pictures; 0: one for each CPU core."""


@dataclass(frozen=True)
class Configs:
    """List the configs that come with the package, which train and benchmark take by name from any folder."""


@dataclass(frozen=True)
class Env:
    """Print versions, devices, settings and the system, for a bug report."""


NewWorkdir = Annotated[Positional, shown("WORKDIR")]
ConfigFile = Annotated[str, shown("CONFIG", "none")]


@dataclass(frozen=True)
class FromDiffusers:
    """Import a model of diffusers (UNet2DModel or DDPMPipeline) as a run at step 0."""

    source: Annotated[Positional, shown("FOLDER-OR-ID")]
    """Folder, or id on the hub such as google/ddpm-cifar10-32."""
    workdir: NewWorkdir
    """New folder that the run is written to."""
    config: ConfigFile = ""
    """Name or file of a config of the same model, for the run's data and training options."""


@dataclass(frozen=True)
class FromTensorflow:
    """Import a checkpoint of the authors' code: parameters, their moving averages, Adam's moments and the step."""

    checkpoint: Annotated[Positional, shown("FILE")]
    """Path of the checkpoint's files without .index or .data, such as model.ckpt-790000."""
    workdir: NewWorkdir
    """New folder that the run is written to."""
    config: Annotated[str, shown("CONFIG")]
    """Name or file of the config of the checkpoint's model, such as cifar10."""


@dataclass(frozen=True)
class ToDiffusers:
    """Write the run in WORKDIR as a new FOLDER that diffusers' DDPMPipeline.from_pretrained loads, with a model card."""

    workdir: Annotated[Positional, shown("WORKDIR")]
    """Folder of the run."""
    folder: Annotated[tyro.conf.Positional[Path], shown("FOLDER")]
    """New folder that the model is written to."""
    parameters: ParametersGroup = field(default_factory=Parameters)


@dataclass(frozen=True)
class Export:
    """Write a run's parameters (FILE.safetensors) or whole sampler (FILE.jax_export) for programs without this package."""

    workdir: Annotated[Positional, shown("WORKDIR")]
    """Folder of the run."""
    file: Annotated[Positional, shown("FILE")]
    """New file; its ending says what is written."""
    parameters: ParametersGroup = field(default_factory=Parameters)


@dataclass(frozen=True)
class FromParameters:
    """Import parameters (pretrained:NAME, or a .safetensors file that export made) as a run at their step."""

    source: Annotated[Positional, shown("PARAMETERS")]
    """pretrained:NAME, or a file."""
    workdir: NewWorkdir
    """New folder that the run is written to."""
    weights: Literal["ema", "raw"] = "ema"
    """The kind of parameters that the file holds."""


@dataclass(frozen=True)
class ToResult:
    """Reduce the run in WORKDIR to a result, results/NAME: its curve, evaluations, first samples and EMA parameters."""

    workdir: Annotated[Positional, shown("WORKDIR")]
    """Folder of the run."""
    folder: Annotated[Positional, shown("FOLDER")]
    """New folder that the result is written to."""
    more: Annotated[tuple[str, ...], shown("WORKDIR", "none")] = ()
    """Folders of runs of the same config with other seeds, 2 or more, for the spread of the curve."""
    command: Annotated[str, shown("TEXT", "train, the config's name, and the fields that differ")] = ""
    """The command that trained it."""
    hardware: Annotated[str, shown("TEXT", "this machine's processor")] = ""
    """The hardware that trained it, in words."""


@dataclass(frozen=True)
class Inception:
    """Convert the public PyTorch weights of Inception-v3 into the cache, for evaluate.py."""

    file: Annotated[Positional, shown("FILE")]
    """The weights, as they were downloaded (docs/evaluation.md)."""


@dataclass(frozen=True)
class Classifier:
    """Train a small classifier on the labelled images of the run in WORKDIR, as features for evaluate.py --features FILE."""

    workdir: Annotated[Positional, shown("WORKDIR")]
    """Folder of the run."""
    file: Annotated[Positional, shown("FILE")]
    """New file, the classifier as a program of jax.export."""
    test: Annotated[str, shown("SOURCE", "the run's train.eval_source")] = ""
    """Labelled images that the accuracy is told of, as data.source names them."""
    epochs: Annotated[int, Bounds(1, 1000)] = 5
    """Passes over the training images."""


CONVERSIONS: dict[str, Callable[..., Any]] = {
    "from-diffusers": FromDiffusers,
    "from-tensorflow": FromTensorflow,
    "from-parameters": FromParameters,
    "to-diffusers": ToDiffusers,
    "to-result": ToResult,
    "export": Export,
    "inception": Inception,
    "classifier": Classifier,
}


def _of_config(
    options: type, words: Sequence[str], load: Callable[[str], Config], about: str
) -> tuple[str, Config, Any]:
    """The first word, the config that it names, and the options, whose defaults are this config's."""
    if not words or words[0].startswith("-"):
        if {"-h", "--help"} & set(words):
            note = f"The defaults below are the paper's; {program()} CONFIG --help shows those of a config."
            description = f"{options.__doc__} {note}"
            prog = f"{program()} {about}"
            tyro.cli(options, prog=prog, args=["--help"], default=options(Config()), description=description)
        raise UsageError(f"no config was given; run {program()} {about}, and {program()} --help for the options")
    given = load(words[0])
    prog = f"{program()} {words[0]}"
    return words[0], given, tyro.cli(options, prog=prog, args=words[1:], default=options(given))


def _check_given(words: Sequence[str], what: str) -> None:
    """Raises UsageError for an empty command line. what: its first word, in capitals."""
    if not words:
        raise UsageError(f"no {what} was given; run {program()} {what}, and {program()} --help for the options")


def train(words: Sequence[str]) -> Train:
    """The command line of train.py: CONFIG-or-PICTURES and options."""

    def load(name: str) -> Config:
        if not are_pictures(name):
            return load_config(name)
        from ddpm_jax.commands.own_pictures import config_of_pictures  # looking at pictures imports JAX

        return config_of_pictures(name, words[1:])

    _, _, arguments = _of_config(Train, words, load, "CONFIG-or-PICTURES")
    if not arguments.workdir:
        raise UsageError("no workdir was given; add --workdir runs/NAME")
    check(arguments.config, num_devices=None)
    return arguments


def sample(words: Sequence[str]) -> Sample:
    """The command line of sample.py."""
    _check_given(words, "WORKDIR")
    arguments = tyro.cli(Sample, prog=program(), args=words)
    given = arguments.given
    for options in (arguments, given):
        check_bounds(options)
    check_given(given)
    if arguments.first_image + (arguments.num_images or 1) > LAST_IMAGE:
        raise UsageError(f"--first-image and --num-images go beyond image {LAST_IMAGE}; choose smaller ones")
    if given.interpolate and arguments.first_image:
        raise UsageError("--interpolate draws all of its images together; leave out --first-image")
    if arguments.animation != "none" and (given.from_images or given.inpaint or given.interpolate):
        raise UsageError(
            "--animation shows the reverse process from noise alone; leave it out with pictures to start from"
        )
    return arguments


def evaluate(words: Sequence[str]) -> Evaluate:
    """The command line of evaluate.py."""
    _check_given(words, "WORKDIR")
    arguments = tyro.cli(Evaluate, prog=program(), args=words)
    if "--metrics" in words and not arguments.metrics:
        raise UsageError(
            f"--metrics is empty, and WORKDIR is {arguments.workdir}; give some of {', '.join(METRIC.choices)}"
        )
    check_options(arguments.options)
    return arguments


def benchmark(words: Sequence[str]) -> Benchmark:
    """The command line of benchmark.py: CONFIG-or-WORKDIR and options."""

    def is_run(name: str) -> bool:
        return "://" in name or Path(name).is_dir()

    def load(name: str) -> Config:
        return read_config(epath.Path(name)) if is_run(name) else load_config(name)

    name, given, arguments = _of_config(Benchmark, words, load, "CONFIG-or-WORKDIR")
    if is_run(name):
        config, fixed = arguments.config, "--model, --data and --diffusion options"
        if (config.model, config.data, config.diffusion) != (given.model, given.data, given.diffusion):
            raise UsageError(f"{name} is a run, whose network, images and process are fixed; leave out {fixed}")
        arguments = dataclasses.replace(arguments, workdir=name)
    if arguments.against and arguments.compile_for:
        raise UsageError("--against measures and --compile-for runs nothing; leave out one of them")
    check_plan(arguments.plan, compiling=bool(arguments.compile_for), comparing=bool(arguments.against))
    return dataclasses.replace(arguments, words=_for_other_versions(name, given, arguments.config))


def _for_other_versions(name: str, given: Config, config: Config) -> tuple[str, ...]:
    """A command line's beginning that gives the config to another version: a run or a file, and the fields that differ.

    Of a shipped config every field that is not the default is said, as that version may have another file of this name, and
    its refusal then names the field that it does not know.
    """
    path = shipped().get(name, Path(name)).resolve()
    if path in [shipped_path.resolve() for shipped_path in shipped().values()]:
        return str(DEFAULTS), *options_of(Config(), config)
    return str(path) if path.exists() else name, *options_of(given, config)


def convert(words: Sequence[str]) -> Any:
    """The command line of convert.py: one of CONVERSIONS."""
    about = "Weights in and out."
    arguments = tyro.extras.subcommand_cli_from_dict(
        CONVERSIONS, prog=program(), args=words, description=about, sort_subcommands=False
    )
    check_bounds(arguments)
    return arguments


def prepare_data(words: Sequence[str]) -> PrepareData:
    """The command line of prepare_data.py."""
    _check_given(words, "SOURCE")
    arguments = tyro.cli(PrepareData, prog=program(), args=words)
    check_bounds(arguments)
    return arguments


PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    **{f.__name__: f for f in (train, sample, evaluate, convert, benchmark, prepare_data)},
    "configs": lambda words: tyro.cli(Configs, prog=program(), args=words),
    "env": lambda words: tyro.cli(Env, prog=program(), args=words),
}
