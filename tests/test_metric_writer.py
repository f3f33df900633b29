"""What a run writes, and that it can be cut back to any step so that continuing repeats none and loses none."""

import io
import itertools
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from ddpm_jax.core.errors import UsageError
from ddpm_jax.data.sheets import enlarge, grid, png_bytes, to_pil
from ddpm_jax.training.metric_writer import (
    EVENTS,
    METRICS,
    MetricWriter,
    best_step,
    cut_events,
    cut_metrics,
    read_metrics,
)

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def metrics(workdir):
    lines = [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]
    assert all(list(line)[-1] == "crc32" for line in lines)
    return [{name: value for name, value in line.items() if name != "crc32"} for line in lines]


def records(path):
    """The events of a file, each with both of its checksums verified."""
    content, position, events = path.read_bytes(), 0, []
    while position < len(content):
        length, checksum = struct.unpack_from("<QI", content, position)
        assert checksum == masked_crc32c(content[position : position + 8])
        data = content[position + 12 : position + 12 + length]
        assert struct.unpack_from("<I", content, position + 12 + length) == (masked_crc32c(data),)
        events.append(Event.FromString(data))
        position += length + 16
    return events


def scalars(workdir):
    """All (step, name, value) that TensorBoard would find, by step."""
    return sorted(
        (event.step, value.tag, value.simple_value)
        for path in (workdir / EVENTS).iterdir()
        for event in records(path)
        for value in event.summary.value
        if value.HasField("simple_value")
    )


def write(workdir, steps, *, last_step=0, run=0):
    """A run that goes on from last_step and logs at the given steps."""
    writer = MetricWriter(workdir, last_step=last_step)
    for step in steps:
        writer.write(step, {"loss": step + run / 8, "lr": 0.5})
    writer.close()


# ---- Metrics


def test_every_scalar_is_a_line_and_an_event(workdir):
    write(workdir, [10, 20])
    assert metrics(workdir) == [{"step": 10, "loss": 10.0, "lr": 0.5}, {"step": 20, "loss": 20.0, "lr": 0.5}]
    assert scalars(workdir) == [(10, "loss", 10.0), (10, "lr", 0.5), (20, "loss", 20.0), (20, "lr", 0.5)]
    (file,) = (workdir / EVENTS).iterdir()
    assert records(file)[0].file_version == "brain.Event:2"
    assert all(event.wall_time > 1.7e9 for event in records(file))


def test_losses_are_logged_to_the_last_bit(workdir):
    writer = MetricWriter(workdir, last_step=0)
    values = [0.1 + 0.2, 1e-45, 1 / 3, 1e300]
    for step, value in enumerate(values):
        writer.write(step, {"loss": value})
    writer.close()
    assert [line["loss"] for line in metrics(workdir)] == values


def test_what_was_written_is_on_the_disk(workdir):
    writer = MetricWriter(workdir, last_step=0)
    writer.write(10, {"loss": 1.0})
    writer.write(20, {}, {"samples": IMAGES})  # killed here, nothing is lost
    assert metrics(workdir) == [{"step": 10, "loss": 1.0}]
    assert scalars(workdir) == [(10, "loss", 1.0)]
    (file,) = (workdir / EVENTS).iterdir()
    assert [event.step for event in records(file)] == [0, 10, 20]
    writer.close()


@pytest.mark.parametrize(("last_step", "kept"), [(0, []), (9, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30])])
def test_metrics_are_cut_beyond_a_step(last_step, kept, workdir):
    write(workdir, [10, 20, 30])
    cut_metrics(workdir / METRICS, last_step)
    assert [line["step"] for line in metrics(workdir)] == kept


def test_a_torn_last_line_is_cut(workdir):
    write(workdir, [10, 20])
    path = workdir / METRICS
    content = path.read_text()
    first, second = content.splitlines(keepends=True)
    for left in range(1, len(second)):
        path.write_text(first + second[:left])
        cut_metrics(path, 100)
        assert path.read_text() == first
    path.write_text(content)
    cut_metrics(path, 100)
    assert path.read_text() == content


DAMAGED_LINES = {
    "garbage": b"}{ no line",
    "no object": b"[1, 2]",
    "no step": b'{"loss": 1.0}',
    "a step that is none": b'{"step": "10", "loss": 1.0}',
    "a step that is true": b'{"step": true, "loss": 1.0}',
    "a step below 0": b'{"step": -1, "loss": 1.0}',
    "a value that is none": b'{"step": 15, "loss": [1.0]}',
    "null": b'{"step": 15, "loss": null}',
    "a huge number": b'{"step": 15, "loss": 1' + b"0" * 400 + b"}",
    "not UTF-8": b'{"step": 15, "\xff": 1.0}',
    "UTF-16": '{"step": 15}'.encode("utf-16-le"),
    "zeros": bytes(512),
    "empty": b"",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED_LINES)
def test_a_damaged_line_is_cut_and_no_intact_one(damage, workdir):
    write(workdir, [10, 20, 30])
    path = workdir / METRICS
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + DAMAGED_LINES[damage] + b"\n" + second + DAMAGED_LINES[damage] + b"\n" + third)
    assert [line["step"] for line in read_metrics(workdir)] == [10, 20, 30]
    assert best_step(workdir, "loss", [10, 20, 30]) == 10
    said = []
    writer = MetricWriter(workdir, last_step=20, say=said.append)
    writer.write(30, {"loss": 0.5})
    writer.close()
    assert path.read_bytes().startswith(first + second)
    assert [(line["step"], line["loss"]) for line in metrics(workdir)] == [(10, 10.0), (20, 20.0), (30, 0.5)]
    (note,) = said
    assert f"{path} had 2 damaged lines" in note
    MetricWriter(workdir, last_step=30, say=said.append).close()
    assert said == [note]


def test_a_flipped_bit_anywhere_in_a_line_changes_no_number_in_silence(workdir):
    write(workdir, [10, 20])
    path = workdir / METRICS
    content, intact = path.read_bytes(), read_metrics(workdir)
    name = content.index(b'"crc32"')  # with its name flipped, the checksum is a number more
    for position in range(content.index(b"\n")):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            lines = read_metrics(workdir)
            if name < position < name + 7 and len(lines) == 2:
                assert set(intact[0].items()) < set(lines[0].items())
            else:
                assert lines in (intact, intact[1:]), (position, bit)
    path.write_text('{"step": 5, "loss": 0.5}\n')  # of an earlier version
    assert read_metrics(workdir) == [{"step": 5, "loss": 0.5}]


def test_zeros_before_a_line_cost_no_line(workdir):
    write(workdir, [10, 20])
    path = workdir / METRICS
    content = path.read_bytes()
    path.write_bytes(bytes(100) + content)
    assert [line["step"] for line in read_metrics(workdir)] == [10, 20]
    assert cut_metrics(path, 100) == 0
    assert path.read_bytes() == content


def test_the_best_step_is_found_among_lines_whose_value_is_a_text(workdir):
    (workdir / METRICS).write_text('{"step": 4, "eval_loss": "low"}\n{"step": 8, "eval_loss": 0.5}\n')
    assert best_step(workdir, "eval_loss", [4, 8]) == 8


def test_logs_that_are_no_files_are_told(workdir):
    (workdir / METRICS).mkdir()
    with pytest.raises(UsageError, match=r"metrics\.jsonl is damaged \(it is no regular file\)"):
        read_metrics(workdir)


def test_cutting_what_is_not_there_does_nothing(workdir):
    cut_metrics(workdir / METRICS, 0)
    cut_events(workdir / EVENTS, 0)
    assert list(workdir.iterdir()) == []


# ---- Events


@pytest.mark.parametrize(("last_step", "kept"), [(0, []), (9, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30])])
def test_events_are_cut_beyond_a_step(last_step, kept, workdir):
    write(workdir, [10, 20, 30])
    cut_events(workdir / EVENTS, last_step)
    assert [step for step, name, _ in scalars(workdir) if name == "loss"] == kept
    (file,) = (workdir / EVENTS).iterdir()  # no temporary file is left beside it
    assert records(file)[0].file_version == "brain.Event:2"


def test_a_torn_last_record_is_cut(workdir):
    write(workdir, [10, 20])
    (file,) = (workdir / EVENTS).iterdir()
    content = file.read_bytes()
    last = records(file)[-1]
    whole = len(content) - last.ByteSize() - 16
    for left in range(whole + 1, len(content)):
        file.write_bytes(content[:left])
        cut_events(workdir / EVENTS, 100)
        assert file.read_bytes() == content[:whole]
    file.write_bytes(content)
    cut_events(workdir / EVENTS, 100)
    assert file.read_bytes() == content


@pytest.mark.parametrize("tail", [bytes(40), b"\xff" * 40, b"no record, but longer than one would be"])
def test_a_tail_that_is_no_record_is_cut(tail, workdir):
    write(workdir, [10, 20])
    (file,) = (workdir / EVENTS).iterdir()
    content = file.read_bytes()
    file.write_bytes(content + tail)
    cut_events(workdir / EVENTS, 100)
    assert file.read_bytes() == content


def starts(content):
    """Where each record of an event file begins, and where the last one ends."""
    positions = [0]
    while positions[-1] < len(content):
        positions.append(positions[-1] + struct.unpack_from("<Q", content, positions[-1])[0] + 16)
    return positions


def test_a_record_whose_content_is_flipped_is_cut_and_the_others_stay(workdir):
    writer = MetricWriter(workdir, last_step=0)
    writer.write(10, {"loss": 10.0})
    writer.write(20, {}, {"samples": IMAGES})
    writer.write(30, {"loss": 30.0})
    writer.close()
    (file,) = (workdir / EVENTS).iterdir()
    content = file.read_bytes()
    places = starts(content)
    for start, end in itertools.pairwise(places):
        for position in (start + 12, (start + end) // 2, end - 1):  # also in the checksum that ends a record
            flipped = bytearray(content)
            flipped[position] ^= 4
            file.write_bytes(flipped)
            said = []
            MetricWriter(workdir, last_step=30, say=said.append).close()
            assert file.read_bytes() == content[:start] + content[end:]
            (note,) = said
            assert f"{workdir / EVENTS} had 1 damaged records" in note
            for other in set((workdir / EVENTS).iterdir()) - {file}:
                other.unlink()


def test_a_flipped_length_ends_the_file_there(workdir):
    write(workdir, [10, 20, 30])
    (file,) = (workdir / EVENTS).iterdir()
    content = bytearray(file.read_bytes())
    third = starts(content)[2]
    content[third] ^= 1
    file.write_bytes(content)
    assert cut_events(workdir / EVENTS, 30) == 1
    assert file.read_bytes() == content[:third]


def test_a_record_with_right_checksums_that_is_no_event_is_cut(workdir):
    write(workdir, [10])
    (file,) = (workdir / EVENTS).iterdir()
    content, data = file.read_bytes(), b"\x0f\xff no event"
    header = struct.pack("<Q", len(data))
    record = header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))
    file.write_bytes(content[: starts(content)[1]] + record + content[starts(content)[1] :])
    assert cut_events(workdir / EVENTS, 10) == 1
    assert file.read_bytes() == content


def test_other_files_are_left_alone(workdir):
    write(workdir, [10])
    (workdir / EVENTS / "note.txt").write_text("mine")
    cut_events(workdir / EVENTS, 0)
    assert (workdir / EVENTS / "note.txt").read_text() == "mine"


# ---- Continuing


def test_no_step_appears_twice_and_none_is_lost(workdir):
    # (restored step, steps logged before the next kill): kills after, before and right at a checkpoint, and one at the start
    runs = [(0, [10, 20]), (0, [10, 20, 30, 40]), (30, [40, 50, 60]), (50, [60]), (60, []), (60, [70])]
    for run, (last_step, steps) in enumerate(runs):
        write(workdir, steps, last_step=last_step, run=run)
    expected = [(10, 1), (20, 1), (30, 1), (40, 2), (50, 2), (60, 3), (70, 5)]  # step and the run that it is from
    assert [(line["step"], line["loss"]) for line in metrics(workdir)] == [(s, s + run / 8) for s, run in expected]
    assert [(s, v) for s, name, v in scalars(workdir) if name == "loss"] == [(s, s + run / 8) for s, run in expected]


def test_two_starts_within_a_second_keep_both_files(workdir, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.7e9)
    write(workdir, [10, 20])
    write(workdir, [30], last_step=20)
    assert [step for step, name, _ in scalars(workdir) if name == "loss"] == [10, 20, 30]
    assert len(list((workdir / EVENTS).iterdir())) == 2


# ---- Images


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_gives_every_pixel_back(channels):
    image = np.random.default_rng(1).integers(0, 256, (5, 7, channels), np.uint8)
    decoded = pixels(png_bytes(image))
    np.testing.assert_array_equal(decoded, image[..., 0] if channels == 1 else image)
    assert to_pil(image).mode == {1: "L", 3: "RGB"}[channels]


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (9, 3, 3), (10, 4, 3)])
def test_grid_is_as_square_as_the_number_allows(number, columns, rows):
    assert grid(np.zeros((number, 4, 5, 3), np.uint8)).shape == (rows * 5 - 1, columns * 6 - 1, 3)


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_grid_reads_like_text(gap):
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    sheet = grid(images, columns=3, gap=gap)
    assert sheet.shape == (4 + gap, 9 + 2 * gap, 1)
    for i in range(6):
        y, x = i // 3 * (2 + gap), i % 3 * (3 + gap)
        assert np.all(sheet[y : y + 2, x : x + 3] == (i + 1 if i < 5 else 0))  # the last place is black
    assert np.count_nonzero(sheet) == 5 * 6  # and so are the gaps


def test_enlarge_repeats_pixels():
    image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert enlarge(image, smallest=7).shape == (6, 9, 1)
    np.testing.assert_array_equal(enlarge(image, smallest=7)[::3, ::3], image)
    np.testing.assert_array_equal(enlarge(image, smallest=7)[2::3, 2::3], image)
    np.testing.assert_array_equal(enlarge(image, smallest=2), image)
    np.testing.assert_array_equal(enlarge(image, smallest=1), image)


def test_a_grid_that_is_cut_short_is_not_there(workdir, monkeypatch):
    writer = MetricWriter(workdir, last_step=0)
    write_bytes = type(workdir).write_bytes
    monkeypatch.setattr(type(workdir), "write_bytes", lambda path, data: write_bytes(path, data[:9]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.write(10, {}, {"samples": IMAGES})
    assert not writer.has("samples", 10)
    writer.close()


def test_a_log_that_cannot_be_written_raises_the_systems_error_alone():
    """Also when it is closed after that: a full disk ends a run with one sentence."""
    writer = MetricWriter.__new__(MetricWriter)
    writer._metrics = open("/dev/full", "w")  # noqa: SIM115 - MetricWriter closes it
    writer._events = SimpleNamespace(close=lambda: closed.append(True))
    closed = []
    writer._metrics.write("a line")
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert writer._metrics.closed
    assert closed == [True]


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_a_picture_in_the_folder_and_in_tensorboard(channels, workdir):
    images = np.repeat(IMAGES, channels, axis=-1)
    writer = MetricWriter(workdir, last_step=0)
    writer.write(40, {}, {"samples": images})
    writer.close()
    sheet = enlarge(grid(images))
    expected = sheet[..., 0] if channels == 1 else sheet
    np.testing.assert_array_equal(pixels((workdir / "samples/step_00000040.png").read_bytes()), expected)
    (file,) = (workdir / EVENTS).iterdir()
    (event,) = (event for event in records(file) if event.summary.value)
    assert (event.step, event.summary.value[0].tag) == (40, "samples")
    shown = pixels(event.summary.value[0].image.encoded_image_string)
    np.testing.assert_array_equal(shown.reshape((*shown.shape[:2], -1))[..., 0], sheet[..., 0])
