"""Odd command lines and pictures: each must end in one sentence. python tests/faults/odd.py runs them all, on one device."""

import os
import resource
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

HUGE = ["1000000000", "10000000000", "99999999999999999999", "-1", "0", "nan", "1e400", "x", ""]
TRAIN = {
    "--train.batch-size": HUGE,
    "--train.num-samples": ["1000000000", "0", "-3", "x"],
    "--train.steps": ["10000000000", "0", "-1", "1.5"],
    "--train.lr": ["0", "-1", "nan", "inf", "x"],
    "--train.ema-decay": ["1", "1.5", "-0.1", "nan"],
    "--train.steps-per-dispatch": ["1000000000", "0", "7"],
    "--train.accumulation": ["1000000000", "0", "3"],
    "--train.fsdp": ["0", "3", "1000000000"],
    "--train.eval-every": ["2", "-1"],
    "--train.keep-last": ["1", "0"],
    "--train.init-from": ["nowhere", "/proc", "config.py"],
    "--model.ch": ["1000000", "10000000000", "0", "3", "5"],
    "--model.ch-mult": ["0", "1000000000", "-1", "x"],
    "--model.num-res-blocks": ["100000000", "0"],
    "--model.attn-resolutions": ["3", "0", "1000000"],
    "--model.groups": ["0", "3", "1000000000"],
    "--model.dropout": ["1", "-1", "nan"],
    "--model.dtype": ["float8", "int8"],
    "--diffusion.T": ["10000000000", "1", "0", "-5"],
    "--diffusion.beta-end": ["0", "1.5", "nan", "-1"],
    "--diffusion.schedule": ["liner", "cosinus"],
    "--diffusion.prediction": ["noise", "epsilon"],
    "--diffusion.variance": ["learned", "large"],
    "--diffusion.loss": ["mse", "hybrid"],
    "--data.image-size": ["0", "1000000", "7", "1000000000000", "8 7", "8 0", "8 8 8", "1000000 8", "x 8"],
    "--data.value-range": ["0", "1 0", "0 nan", "0 1 2", "x y", "0 1e39", "-1 -1"],
    "--data.channels": ["0", "2", "4"],
    "--data.workers": ["-1", "1000000000"],
    "--data.source": ["nowhere", "pictuers", "FOLDER", "", "/proc/self", "/dev/zero", "config.py", "x" * 5000],
    "--data.source ": ["tfds:", "tfds:nothing"],
    "--seed": ["-1", "4294967296", "x"],
    "--no-such-option": ["1"],
    "--train.batchsize": ["4"],
}
SAMPLE = {
    "--num-images": ["2000000000", "0", "-1", "x", "99999999999"],
    "--batch-size": ["1000000000", "0", "-1"],
    "--seed": ["-1", "4294967296"],
    "--steps": ["0", "6", "1000000000", "3 3 3"],
    "--sampler": ["dddim", "euler"],
    "--spacing": ["cubic"],
    "--eta": ["0.5", "2", "nan"],
    "--clip": ["all"],
    "--step": ["7", "-1", "best", "x"],
    "--weights": ["both"],
    "--first-image": ["-1", "3000000000"],
    "--out": ["config.py/x", "/proc/x", "x" * 300, "pictures", "config.py"],
    "--format": ["gif"],
    "--animation": ["mp4"],
}
EVALUATE = {
    "--num-images": ["2000000000000", "-1", "x"],
    "--batch-size": ["1000000000", "0"],
    "--metrics": ["fdi", "is", ""],
    "--terms": ["100", "-1"],
    "--bootstrap": ["1", "-1"],
    "--statistics": ["nowhere", "config.py", "pictures"],
    "--source": ["nowhere", "config.py"],
    "--step": ["7", "x"],
    "--seed": ["-1"],
}


def command_lines():
    """(command, arguments) of everything above and more."""
    for option, values in TRAIN.items():
        for value in values:
            yield [
                "train",
                "config.py",
                "--workdir",
                "new",
                "--data.source",
                "pictures",
                option,
                *(value.split() or [""]),
            ]
    for table, name in ((SAMPLE, "sample"), (EVALUATE, "evaluate")):
        extra = ["--features", "pixels"] if name == "evaluate" else []
        for option, values in table.items():
            for value in values:
                yield [name, "run", *extra, option, *(value.split() or [""])]
    for name in ("sample", "evaluate"):
        for workdir in ("nowhere", "config.py", "pictures", "", "x" * 5000, "gs://bucket/run", "foo://x", "/proc"):
            yield [name, workdir]
    for config in ("nowhere.py", "cache", "run", "config.txt", "", "broken.py", "empty.py", "pictures/00.png"):
        yield ["train", config, "--workdir", "new"]
    for workdir in ("config.py", "config.py/x", "/proc/x", "pictures", "x" * 300, "s3://bucket/x"):
        yield ["train", "config.py", "--workdir", workdir, "--data.source", "pictures"]
    for arguments in (
        ["nowhere"],
        ["cifar10"],
        ["tfds:"],
        ["pictures"],
        ["config.py", "--check"],
        ["odd", "--check"],
        [""],
    ):
        yield ["prepare_data", *arguments]
    for source in ("nowhere", "config.py", "pictures", "not a hub id!", ""):
        yield ["convert", "from-diffusers", source, "new"]
    for target in ("config.py", "pictures", "config.py/x", "/proc/x", "x" * 300):
        yield ["convert", "to-diffusers", "run", target]
    for target in ("x.onnx", "x", "config.py/x.safetensors", "/proc/x.safetensors", "/proc/x.jax_export"):
        yield ["convert", "export", "run", target]
    yield ["convert"]
    yield ["convert", "form-diffusers", "a", "b"]
    for option, value in (
        ("--batch-sizes", "1000000000"),
        ("--repeats", "0"),
        ("--steps", "0"),
        ("--peak-tflops", "nan"),
    ):
        yield ["benchmark", "config.py", "--samplers", "ddim", option, value]
    yield ["benchmark", "config.py", "--samplers", "euler"]


def png(width, height, depth=8, colour=2, data=b""):
    """A PNG with any header."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def pictures():
    """Odd pictures by name."""
    good = png(8, 8, data=b"".join(b"\0" + bytes(24) for _ in range(8)))
    yield "cut.png", good[: len(good) // 2]
    yield "empty.png", b""
    yield "text.png", b"no picture"
    yield "zeros.png", bytes(1000)
    yield "bomb.png", png(100_000, 100_000)
    yield "wide.png", png(2**31 - 1, 1)
    yield "nothing.png", png(0, 0)
    yield "short.png", png(8, 8, data=b"\0")
    yield "depth.png", png(8, 8, depth=3)
    yield "colour.png", png(8, 8, colour=9)
    yield "gif.png", b"GIF89a" + bytes(100)
    yield "jpeg.jpg", b"\xff\xd8\xff\xe0" + bytes(100)
    yield "half.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + b"\xff" * 500
    yield "riff.webp", b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(50)
    yield "bitmap.bmp", b"BM" + b"\xff" * 60


def main():
    """Runs all of them and tells what was wrong."""
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parent.parent)]
    os.environ |= {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    import scenes

    wrong, count, slowest = [], 0, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes.pictures(folder)
        scenes.trained(folder, 2)
        (folder / "broken.py").write_text("config = 1 / 0\n")
        (folder / "empty.py").write_text("")
        (folder / "config.txt").write_text("config = 1\n")
        lines = [(line, None) for line in command_lines()]
        for name, content in pictures():
            line = ["train", "config.py", "--workdir", "new", "--data.source", f"odd_{name}", "--train.steps", "2"]
            lines.append((line, (name, content)))
        (folder / "odd").mkdir()
        for name, content in pictures():
            (folder / "odd" / name).write_bytes(content)
            (folder / f"odd_{name}").mkdir()
            (folder / f"odd_{name}" / name).write_bytes(content)
        for line, _ in lines:
            start = time.perf_counter()
            try:
                code, said = scenes.run(folder, *line)
            except BaseException as error:
                code, said = f"{type(error).__name__}: {error}", ""
            seconds = time.perf_counter() - start
            count, slowest = count + 1, max(slowest, seconds)
            shown = [a if len(a) < 60 else f"{a[:20]}...({len(a)})" for a in line]
            if code not in (1, 2) or "Traceback" in said or not said.strip() or seconds > 30:
                wrong.append(f"{shown}: {code} in {seconds:.1f} s: {said[-300:]}")
                print(wrong[-1], flush=True)
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{count} odd inputs, {len(wrong)} wrong; slowest {slowest:.1f} s, at most {gigabytes:.2f} GB")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
