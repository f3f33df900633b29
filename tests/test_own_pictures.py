"""Pictures in the config's place: train.py PICTURES chooses a small config, says so, and continues by the same command."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.commands import arguments, train
from ddpm_jax.commands.config_file import are_pictures
from ddpm_jax.commands.own_pictures import config_of_pictures
from ddpm_jax.core.errors import UsageError

TINY = (
    "--model.ch 8 --model.ch-mult 1 --model.attn-resolutions 16 --model.groups 4 --diffusion.T 10 --train.batch-size 8"
)
SHORT = "--train.steps-per-dispatch 1 --train.log-every 1 --train.save-every 1 --train.sample-every 0"


def pictures(folder, *sizes, mode="RGB"):
    folder.mkdir()
    for i, size in enumerate(sizes):
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).convert(mode).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("sizes", "chosen"), [([(40, 33), (32, 90), (8, 8)], 32), ([(31, 90), (20, 20), (64, 64)], 16)]
)
def test_the_size_is_one_that_half_of_the_pictures_have(sizes, chosen, tmp_path, capsys):
    config = config_of_pictures(pictures(tmp_path / "p", *sizes), [])
    assert (config.data.image_size, config.data.channels) == (chosen, 3)
    assert config.data.source == str(tmp_path / "p")
    said = capsys.readouterr().out
    assert "3 pictures" in said
    assert f"trained at {chosen} x {chosen}, in colour" in said


@pytest.mark.parametrize(("modes", "channels"), [(["L", "1", "LA"], 1), (["L", "RGB", "L"], 3)])
def test_pictures_that_are_all_grey_are_trained_grey(modes, channels, tmp_path):
    for i, mode in enumerate(modes):
        Image.new("RGB", (32, 32), "red").convert("L").convert(mode).save(tmp_path / f"{i}.png")
    assert config_of_pictures(str(tmp_path), []).data.channels == channels


def test_a_zip_file_and_damaged_pictures_are_looked_at(tmp_path):
    pictures(tmp_path / "p", (16, 16))
    (tmp_path / "p" / "damaged.png").write_bytes(b"\x89PNG")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in (tmp_path / "p").iterdir():
            archive.write(path, path.name)
    assert are_pictures(str(tmp_path / "p.zip"))
    assert not are_pictures("configs/digits.py")
    assert config_of_pictures(str(tmp_path / "p.zip"), []).data.image_size == 16
    (tmp_path / "p" / "0.png").unlink()
    with pytest.raises(UsageError, match="none of the pictures can be read"):
        config_of_pictures(str(tmp_path / "p"), [])


def test_the_folder_of_a_run_is_no_folder_of_pictures(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is the folder of a run"):
        config_of_pictures(str(tmp_path), [])


@pytest.mark.slow
def test_the_same_command_trains_and_continues(tmp_path, capsys):
    """What a resume does not name is as the run has it, whatever would be chosen now."""
    name, workdir = pictures(tmp_path / "p", (16, 16), (16, 16)), str(tmp_path / "w")

    def command(*options):
        train.main(arguments.train([name, f"--workdir={workdir}", *options]))
        return capsys.readouterr().out

    assert "trained at 16 x 16" in command(*TINY.split(), *SHORT.split(), "--train.steps", "1")
    written = json.loads((tmp_path / "w" / "config.json").read_text())
    assert (written["data"]["source"], written["data"]["image_size"], written["model"]["ch"]) == (name, 16, 8)
    said = command("--train.steps", "2")
    assert "Continuing from step 1" in said
    assert "trained at" not in said
    assert sorted(path.name for path in (tmp_path / "w" / "checkpoints").iterdir() if path.name.isdecimal()) == [
        "1",
        "2",
    ]
