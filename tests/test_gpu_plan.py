"""results/gpu/gpu.py: what is begun, cut, continued and told. Tasks are stand-ins; the slow test rehearses real ones."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gpu
import outcome
import pytest
from tasks import Options, Task, plan

from ddpm_jax.commands.arguments import PARSERS
from ddpm_jax.core.errors import UsageError

ROOT = Path(__file__).parent.parent
FOREVER = 1e9


def task(name, seconds=10.0, **others):
    return Task(name, ("env",), seconds, **others)


@pytest.fixture
def status(tmp_path):
    return gpu.Status(tmp_path, False)


def carried_out(tasks, status, run=lambda task: (gpu.DONE, 1.0, ""), seconds=FOREVER):
    """The names of the tasks that were begun."""
    begun = []
    gpu.work(tasks, status, lambda task: begun.append(task.name) or run(task), time.monotonic() + seconds)
    return begun


# ---- The plan


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_command_of_the_plan_can_be_parsed(rehearse, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    given = {"data": "a b.zip", "held_out": "c.zip", "features": "pixels"}
    tasks = plan(Options(out=str(tmp_path / "with blank"), rehearse=rehearse, **given))
    assert len({task.name for task in tasks}) == len(tasks)
    seen = {(task.words[0], *(word for word in task.words[1:] if word.startswith("--"))) for task in tasks}
    for each in tasks:
        shape = (each.words[0], *(word for word in each.words[1:] if word.startswith("--")))
        if shape in seen:  # one of each kind
            seen.remove(shape)
            PARSERS[each.words[0]](each.words[1:])
    assert not seen
    assert next(each for each in tasks if each.name == "steps_20k").words.count("a b.zip") == 1


def test_the_rehearsal_has_the_same_tasks():
    plans = [plan(Options(data="x", features="x", rehearse=rehearse)) for rehearse in (False, True)]
    assert [task.name for task in plans[0]] == [task.name for task in plans[1]]


def test_the_essentials_take_six_minutes_and_come_before_the_training():
    tasks = plan(Options(data="x"))
    first = [task.name for task in tasks].index("steps_10k")
    assert 300 <= sum(task.seconds for task in tasks[:first]) <= 400
    assert all(task.words[0] in ("benchmark", "env") for task in tasks[:first])


def test_what_is_not_given_leaves_out_its_tasks():
    lacking = {task.name for task in plan(Options()) if task.lacks}
    assert {"steps_10k", "grid_100k", "distance_20k", "repeat_plain_1"} <= lacking
    assert not [name for name in lacking if name.startswith(("train", "peer", "fit", "sample"))]
    lacking = {task.name for task in plan(Options(data="x")) if task.lacks}
    assert lacking == {f"distance_{n}k" for n in (10, 20, 50, 100)}


# ---- What is begun


def test_tasks_are_begun_in_order_once_and_a_failed_one_stops_none(status, tmp_path):
    tasks = [task("a"), task("b"), task("c", lacks="--data names no pictures"), task("d")]
    states = {"a": (gpu.FAILED, 1.0, "why"), "b": (gpu.DONE, 2.0, ""), "d": (gpu.CUT, 3.0, "")}
    assert carried_out(tasks, status, lambda task: states[task.name]) == ["a", "b", "d"]
    again = gpu.Status(tmp_path, False)
    assert [again.state(name) for name in "abcd"] == ["failed", "done", "", "cut"]
    assert again.tasks["a"]["why"] == "why"


def test_a_task_that_does_not_fit_is_passed_over_for_a_shorter_one(status, capsys):
    assert carried_out([task("long", 500.0), task("short", 50.0)], status, seconds=100) == ["short"]
    assert capsys.readouterr().out.startswith("long: not begun, as 100 s are left, and it takes 500\n")


def test_after_the_time_nothing_is_begun(status, capsys):
    assert carried_out([task("a"), task("b")], status, seconds=-1) == []
    assert capsys.readouterr().out == "The time is over; 2 tasks were not looked at.\n"


def test_a_training_is_begun_while_it_can_do_something(status):
    tasks = [task("steps", 1000.0, least=60.0)]
    assert carried_out(tasks, status, seconds=50) == []
    assert carried_out(tasks, status, lambda task: (gpu.CUT, 40.0, ""), seconds=100) == ["steps"]
    assert carried_out(tasks, status, seconds=61) == ["steps"]


def test_a_measurement_that_was_cut_is_given_more_time(status):
    tasks = [task("row", 10.0)]
    assert carried_out(tasks, status, lambda task: (gpu.CUT, 80.0, ""), seconds=100) == ["row"]
    assert carried_out(tasks, status, seconds=100) == []
    assert carried_out(tasks, status, seconds=121) == ["row"]


def test_a_task_waits_for_the_one_before(status, capsys):
    tasks = [task("steps"), task("grid", after="steps")]
    assert carried_out(tasks, status, lambda task: (gpu.CUT, 1.0, "")) == ["steps"]
    assert "grid: waits for steps\n" in capsys.readouterr().out
    assert carried_out(tasks, status) == ["steps", "grid"]


def test_patterns_name_tasks_and_one_that_names_none_is_refused():
    tasks = [task("train_1"), task("train_2"), task("fit")]
    assert [t.name for t in gpu.chosen(tasks, ("fit", "train_*"))] == ["train_1", "train_2", "fit"]
    assert gpu.chosen(tasks, ()) == tasks
    for pattern, near in (("fti", r"did you mean fit\? "), ("x*", "")):
        with pytest.raises(
            UsageError, match=rf"--only {re.escape(pattern)} names no task; {near}--list prints all of them"
        ):
            gpu.chosen(tasks, (pattern,))


def test_a_rehearsal_is_not_mixed_with_results(status, tmp_path):
    status.enter("a", gpu.DONE, 1.0, "")
    with pytest.raises(UsageError, match="holds results that are no rehearsal; give another folder"):
        gpu.Status(tmp_path, True)


# ---- Processes


def run_python(code, tmp_path, seconds, grace=5.0):
    log, now = tmp_path / "log", time.monotonic()
    command = [sys.executable, "-c", code]
    return *gpu.carry_out(command, dict(os.environ), log, (now + seconds, now + seconds + grace)), log.read_text()


SAVES = """
import signal, sys, time
def save(*_):
    print("saved at step 7", file=sys.stderr)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_that_ends_by_itself_is_not_cut(tmp_path):
    assert run_python("print('ok')", tmp_path, 60) == (0, False, "ok\n")
    code, cut, _ = run_python("raise SystemExit(3)", tmp_path, 60)
    assert (code, cut) == (3, False)


def test_the_time_ends_a_process_which_may_save(tmp_path):
    code, cut, said = run_python(SAVES, tmp_path, 1.5)
    assert (code, cut, gpu.last_sentence(said)) == (143, True, "saved at step 7")


def test_one_that_does_not_end_is_killed(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code, cut, _ = run_python(stubborn, tmp_path, 1.0, grace=0.5)
    assert (code, cut) == (-9, True)


def test_the_reason_of_a_failure_is_one_line():
    assert gpu.last_sentence("Traceback\n  File x\nValueError: no\n\n") == "ValueError: no"
    assert gpu.last_sentence(" 10%|#   | 1/9\r 20%|##  | 2/9\rbenchmark.py: stopped\n") == "benchmark.py: stopped"
    assert gpu.last_sentence("") == "it wrote nothing"
    box = "usage: x\n╭─ Required options ─╮\n│ no --data was   │\n│ given           │\n│ ──── │\n╰────╯\n"
    assert gpu.last_sentence(box) == "no --data was given"


def test_the_variables_of_a_task_add_to_those_that_are_set(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    told = gpu.environment(task("a", flags=("--its",), kernels="k", environment=(("X", "1"),)), tmp_path)
    assert told["XLA_FLAGS"] == f"--mine --its --xla_gpu_per_fusion_autotune_cache_dir={tmp_path}/autotune/k"
    assert (tmp_path / "autotune" / "k").is_dir()
    assert told["X"] == "1"
    assert told["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


# ---- Results


def test_the_rows_of_a_measurement_that_was_cut_are_told_until_it_is_done(tmp_path):
    gpu.write(tmp_path / "a.json", {"rows": [{"what": "new"}]})
    gpu.write(tmp_path / "a.new.json", {"rows": []})
    gpu.write(tmp_path / "b.new.json", {"rows": [{"what": "first of two"}]})
    told = outcome.rows([task("a"), task("b"), task("c")], tmp_path)
    assert told == [{"task": "a", "what": "new"}, {"task": "b", "what": "first of two"}]


def test_two_trainings_are_compared_by_what_they_log(tmp_path):
    def log(name, losses):
        folder = tmp_path / "repeats" / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"step": 10 * i, "loss": loss, "grad_norm": 1.0, "steps_per_s": 0.1} for i, loss in enumerate(losses, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert outcome.differing(tmp_path, "plain") == ""
    log("plain_1", [1.0, 0.5, 0.25])
    log("plain_2", [1.0, 0.5, 0.25])
    assert outcome.differing(tmp_path, "plain") == "in none of 30 steps"
    log("plain_2", [1.0, 0.5000000000000001, 0.25])
    assert outcome.differing(tmp_path, "plain") == "from step 20"


HIDES = """
from importlib.machinery import PathFinder
HIDDEN = ("tensorflow", "tensorflow_datasets", "tensorboard", "array_record", "grain")
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in HIDDEN else find(name, *more)
"""


@pytest.mark.slow
def test_a_rehearsal_goes_on_where_its_time_ended_and_needs_no_tensorflow(tmp_path):
    (tmp_path / "hiding").mkdir()
    (tmp_path / "hiding" / "sitecustomize.py").write_text(HIDES)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "hiding"), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    names = ["environment", "trace", "steps_10k", "grid_10k", "distance_10k", "train_conv_fusion"]

    def call(seconds):
        command = [
            sys.executable,
            "results/gpu/gpu.py",
            "--rehearse",
            "--out",
            tmp_path / "out",
            "--seconds",
            str(seconds),
        ]
        done = subprocess.run(
            [*command, "--only", *names], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "tasks are open; the same command continues." in call(20)
    told = call(500)
    assert told.endswith("all is done.\n")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {name: entry["state"] for name, entry in found["tasks"].items()} == dict.fromkeys(names, "done")
    assert {row["what"] for row in found["rows"]} == {"train step", "ddim"}
    assert set(found["traces"]) == {"train_step_5_11_bfloat16", "ddim_10_1_bfloat16"}
    assert found["curve"][-1]["step"] == 10
    assert [line["step"] for line in found["curve"] if "eval_loss_quarter_1" in line] == [5, 10]
    assert {result["metric"] for result in found["evaluations"]} == {"fid", "kid"}
    assert (tmp_path / "out" / "grids" / "10k" / "grid.png").exists()
    before = found["tasks"]
    call(100)
    assert json.loads((tmp_path / "out" / "status.json").read_text())["tasks"] == before  # nothing is repeated
