"""Checkpoints: asynchronous Orbax saves of a training state, each with a manifest of checksums.

    DIRECTORY/<step>/state      step, params, opt_state, loss_history
    DIRECTORY/<step>/ema        ema_params, a separate item, so that sampling reads nothing else
    DIRECTORY/<step>/averages   the further averages, if the config asks for some
    DIRECTORY/<step>/meta       JSON: the data set's identity, losses not logged yet
    DIRECTORY/<step>/manifest.json   the step, the config's fixed fields, and path, size and SHA-256 of every other file
    DIRECTORY/<step>/kept       empty, and only where the step is never deleted (`keep_for_good`)

A step is written as DIRECTORY/<step>.saving.tmp and renamed once its manifest is complete. It is renamed again before it is
deleted. A kill therefore never leaves a partial step under its final name. (Object stores cannot rename: there, a step without
a manifest is partial.) Array files have no checksums, so a flipped bit would restore silently: the manifest is checked first.
"""

import contextlib
import copy
import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ddpm_jax.config import Config, changed_fields, fixed_fields
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import RunError, UsageError, first_line
from ddpm_jax.core.files import DamagedFileError, digest, fingerprint, parse_json, read_json, read_text, write_text
from ddpm_jax.training.step import TrainState

MANIFEST = "manifest.json"
KEPT = "kept"
NO_STEP = -1
ITEMS = ("state", "ema", "averages", "meta")
SAVING, DELETING = ".saving.tmp", ".deleting.tmp"
# Orbax measures its 20-minute timeout by the wall clock, which may jump. Several processes keep the timeout: they wait for
# each other.
SAVE_SECONDS = 10 * 365 * 86400


def _tree_handler() -> ocp.PyTreeCheckpointHandler:
    # By default each of the n replicas of an array saves its n-th part: thousands of small operations for a state of small
    # arrays. Here only parts of 1 MiB or more are split. The registry is our own, since Orbax's is global.
    default = ocp.type_handlers.get_type_handler(jax.Array)
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=2**20,
        array_metadata_store=getattr(default, "_array_metadata_store", None),  # hosts compare it at the end of a save
    )
    numpy = ocp.type_handlers.get_type_handler(np.ndarray)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays), (np.ndarray, numpy))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _restore_as(like: Any) -> ocp.args.PyTreeRestore:
    """The arguments that restore a tree like `like` (ShapeDtypeStructs with shardings)."""
    return ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))


def _state_item(state: TrainState) -> dict[str, Any]:
    """The fields of the item `state`: all but the averages, and the loss history where there is one."""
    fields = {name: getattr(state, name) for name in ("step", "params", "opt_state", "loss_history")}
    return {name: value for name, value in fields.items() if value is not None}


def _manifest_text(content: dict[str, Any]) -> str:
    # Manifests of earlier versions hold only the files, and their digest covers only these.
    proven = content["files"] if set(content) == {"files"} else content
    return json.dumps(content | {"sha256": digest(proven)}, sort_keys=True)


def write_manifest(folder: epath.Path, step: int, config: Config | None) -> None:
    """Writes the manifest of a finished step folder."""
    files = {str(path.relative_to(folder)): fingerprint(path) for path in _files(folder)}
    fields = None if config is None else fixed_fields(config)
    write_text(folder / MANIFEST, _manifest_text({"files": files, "step": step, "config": fields}))


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """A step folder's manifest: "files", "step" and "config" (None: not recorded); earlier versions hold only "files".

    Raises FileNotFoundError, or DamagedFileError if its digest does not match.
    """
    path = folder / MANIFEST
    text = read_text(path)
    content = parse_json(path, text)
    content.pop("sha256", None)
    if set(content) not in ({"files"}, {"files", "step", "config"}) or text != _manifest_text(content):
        raise DamagedFileError(path, "it does not agree with its own digest")
    return content


def manifest_digest(folder: epath.Path) -> str:
    """SHA-256 of a step folder's manifest, which identifies the checkpoint; "" if there is none."""
    found = fingerprint(folder / MANIFEST)
    return found[1] if found else ""


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """The JSON saved with a step, unverified, read by this process alone: a restore by Orbax waits for all processes.

    Raises OSError or DamagedFileError.
    """
    return read_json(folder / "meta" / "metadata")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def find_damage(folder: epath.Path, *, items: tuple[str, ...] = ITEMS) -> str | None:
    """What is wrong with a step folder, or None if it is intact. Reads the files of the given items and those of no item."""
    try:
        manifest = read_manifest(folder)
        step = manifest.get("step", int(folder.name))
        if step != int(folder.name):
            return f"it is a copy of step {step}"
        for name, expected in manifest["files"].items():
            if name.split("/")[0] in set(ITEMS) - set(items):
                continue
            if not (folder / name).exists():
                return f"the file {name} is missing"
            if fingerprint(folder / name) != expected:
                return f"the file {name} is not what was written"
    except FileNotFoundError:
        return "it has no manifest, so its saving was cut short"
    except DamagedFileError:
        return "its manifest is damaged"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def saved_steps(directory: epath.Path) -> list[int]:
    """The steps with a folder in a run's checkpoint folder, in order, intact or not."""
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def finished_steps(directory: epath.Path) -> list[int]:
    """Those of the `saved_steps` whose saving was completed."""
    return [step for step in saved_steps(directory) if (directory / str(step) / MANIFEST).exists()]


def multiples(steps: list[int], every: int) -> list[int]:
    """The steps that are multiples of `every`; none if that is 0."""
    return [step for step in steps if every and step % every == 0]


def keep_for_good(directory: epath.Path, steps: Iterable[int]) -> None:
    """Marks finished steps, so that no later save deletes them."""
    for step in steps:
        (directory / str(step) / KEPT).touch()


class Checkpoints:
    """The checkpoints of a run.

    config: recorded in each manifest, and compared with it at a restore; None: neither. say: receives one sentence for each
    step that is passed over.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        config: Config | None = None,
        keep_last: int = 2,
        keep_every: int = 0,
        say: Callable[[str], None] = print,
    ):
        self.directory = epath.Path(directory).resolve()  # Orbax requires absolute paths
        self.config = config
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.say = say
        handler = ocp.CompositeCheckpointHandler(
            state=_tree_handler(), ema=_tree_handler(), averages=_tree_handler(), meta=ocp.JsonCheckpointHandler()
        )
        seconds = SAVE_SECONDS if jax.process_count() == 1 else None
        self._checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=seconds)
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._passed_over: set[int] = set()

    def steps(self) -> list[int]:
        """The steps with a folder, in order, intact or not."""
        return saved_steps(self.directory)

    def folder(self, step: int) -> epath.Path:
        """The folder of a step."""
        return self.directory / str(step)

    def save(self, state: TrainState, meta: dict[str, Any], *, keep: int | None = None) -> None:
        """Starts an asynchronous save: returns once the state is copied to the host.

        keep: a step that is not deleted although newer ones exist. Waits for the previous save; raises RunError if that
        failed.
        """
        self.wait()
        step = int(state.step)
        folder = self.folder(step)
        meta = copy.deepcopy(meta)  # it is written later, and the caller changes it meanwhile
        try:
            if jax.process_index() == 0:
                self.sweep()
                if folder.exists():
                    self._delete(folder)  # it was passed over at the start, and the step was trained again
                    self._passed_over.discard(step)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._checkpointer.save(
                self._written_as(folder),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_state_item(state)),
                    ema=ocp.args.PyTreeSave(state.ema_params),
                    meta=ocp.args.JsonSave(meta),
                    **({"averages": ocp.args.PyTreeSave(state.averages)} if state.averages else {}),
                ),
            )
        except Exception as error:
            raise RunError(_save_failed(folder, error)) from error
        self._pending = self._finisher.submit(self._finish, step, keep)

    def _written_as(self, folder: epath.Path) -> epath.Path:
        """The folder of a step during its save."""
        return folder if "://" in str(folder) else folder.parent / f"{folder.name}{SAVING}"

    def _finish(self, step: int, keep: int | None) -> None:
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            folder = self.folder(step)
            written = self._written_as(folder)
            write_manifest(written, step, self.config)
            if written != folder:
                written.rename(folder)
            self._delete_old(keep)

    def _delete_old(self, keep: int | None) -> None:
        # Only finished steps count: a damaged or partial one must not displace an intact one.
        finished = [step for step in finished_steps(self.directory) if step not in self._passed_over]
        stay = {keep, *finished[-self.keep_last :], *multiples(finished, self.keep_every)}
        for step in finished:
            if step not in stay and not (self.folder(step) / KEPT).exists():
                self._delete(self.folder(step))

    def sweep(self) -> None:
        """Removes partial folders that killed processes left. Call it only while no save is running."""
        for path in self.directory.iterdir() if self.directory.exists() else ():
            if path.name.endswith((SAVING, DELETING, ocp.utils.TMP_DIR_SUFFIX)):
                path.rmtree()

    def _delete(self, folder: epath.Path) -> None:
        if "://" in str(folder):  # the manifest goes first: a folder without one is no checkpoint
            (folder / MANIFEST).unlink(missing_ok=True)
        else:
            doomed = folder.parent / f"{folder.name}{DELETING}"
            doomed.rmtree(missing_ok=True)
            folder = folder.rename(doomed)
        folder.rmtree()

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises RunError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise RunError(_save_failed(self.directory, error)) from error

    def close(self) -> None:
        """Waits for the last save and ends all threads."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown()
            with contextlib.suppress(Exception):  # Orbax may raise the error of a failed save again
                self._checkpointer.close()

    def choose(
        self, *, step: int | None = None, unverified: bool = False, items: tuple[str, ...] = ITEMS
    ) -> int | None:
        """The newest intact step, or the given one; None if no save was ever completed. Process 0 decides for all.

        Damaged steps are passed over and reported to `say`.

        Args:
            step: The step to choose.
            unverified: Choose without checking the files.
            items: The items whose files are checked.

        Raises:
            UsageError: If the given step is missing or damaged, or all steps are damaged.
        """
        chosen = sharding.first_decides(lambda: self._choose(step, unverified, items))
        return None if chosen == NO_STEP else chosen

    def _choose(self, step: int | None, unverified: bool, items: tuple[str, ...]) -> int:
        steps = self.steps()
        if step is not None and step not in steps:
            there = f"those there are {', '.join(map(str, steps))}" if steps else "there are none"
            raise UsageError(f"{self.directory} has no checkpoint of step {step}; {there}")
        wanted = steps[::-1] if step is None else [step]
        if unverified and wanted:
            return wanted[0]
        lost, cut_short = False, 0
        for candidate in wanted:
            damage = find_damage(self.folder(candidate), items=items)
            if damage is None:
                self._check_config(candidate)
                return candidate
            if step is not None:
                raise UsageError(
                    f"the checkpoint of step {step} in {self.directory} is not intact: {damage}; "
                    "choose another step, or skip the check with --unverified"
                )
            has_manifest = (self.folder(candidate) / MANIFEST).exists()
            lost, cut_short = lost or has_manifest, cut_short + (not has_manifest)
            self._passed_over.add(candidate)
            self.say(f"The checkpoint of step {candidate} is passed over: {damage}.")
        # A single one may be a killed first save, by an earlier version or on an object store. No kill leaves two.
        if lost or cut_short > 1:
            raise UsageError(
                f"no checkpoint in {self.directory} is intact; start in another workdir, restore a copy of this one, "
                "or use the newest with --unverified"
            )
        return NO_STEP

    def _check_config(self, step: int) -> None:
        """Refuses a config other than the one that an intact step was trained with."""
        recorded = read_manifest(self.folder(step)).get("config")
        if self.config is not None and recorded is not None and (changed := changed_fields(recorded, self.config)):
            raise UsageError(
                f"the checkpoint of step {step} in {self.directory} was trained with another config, which differs in "
                f"{', '.join(changed)}; correct config.json, restore it from a copy, or skip the check with --unverified"
            )

    def restore_state(self, step: int, like: TrainState) -> TrainState:
        """The training state of a step. like: its ShapeDtypeStructs with shardings."""
        averages = {"averages": _restore_as(like.averages)} if like.averages else {}
        restored = self._restore(
            step, state=_restore_as(_state_item(like)), ema=_restore_as(like.ema_params), **averages
        )
        state = restored.state
        if int(state["step"]) != step:
            raise UsageError(
                f"the checkpoint of step {step} in {self.directory} holds the state of step {int(state['step'])}; "
                "choose another step, or restore a copy of this one"
            )
        return TrainState(
            ema_params=restored.ema, averages=restored.averages if averages else None, **{"loss_history": None} | state
        )

    def restore_item(self, step: int, item: str, like: Any) -> Any:
        """The item `ema` or `averages` of a step alone, as `like` (ShapeDtypeStructs with shardings)."""
        return getattr(self._restore(step, **{item: _restore_as(like)}), item)

    def restore_meta(self, step: int) -> dict[str, Any]:
        """The JSON saved with a step: the "data" set's identity, the losses "since_log", the "network".

        "stamp" is a digest of `Source.stamp`; "made_with" has the software and the devices. With classes their names, "classes";
        with train.init_from "init_from": the step, checkpoint and weights of that run.
        """
        meta = self._restore(step, meta=ocp.args.JsonRestore()).meta
        if not isinstance(meta, dict) or "data" not in meta or not isinstance(meta.get("since_log"), dict):
            raise UsageError(
                f"the checkpoint of step {step} in {self.directory} cannot be restored (its meta is not what was written); "
                "choose another step"
            )
        return meta

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._checkpointer.restore(self.folder(step), args=ocp.args.Composite(**items))
        except Exception as error:  # unverified files can cause any error
            raise UsageError(
                f"the checkpoint of step {step} in {self.directory} cannot be restored ({first_line(error)}); "
                "choose another step"
            ) from error


def _save_failed(where: epath.Path, error: Exception) -> str:
    number = _system_error(error)
    reason = os.strerror(number) if number else first_line(error)
    return f"saving to {where} failed ({reason}); earlier checkpoints are intact: {_remedy(number)}"


def _remedy(number: int | None) -> str:
    """What to do about a failed save. number: the errno, or None for any other error."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room and run the same command again"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make the folder writable and run the same command again"
    if number in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
        return "another process has written or deleted files there; stop it, and run the same command again"
    return "fix that, and run the same command again"


def _system_error(error: BaseException | None) -> int | None:
    """The errno that caused an error, or None.

    TensorStore gives it only in its message: "[os_error_code='28']" or "[OS error 28: ...]".
    """
    found = None
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            found = error.errno
        elif named := re.search(r"os[ _]error\D*(\d+)", str(error), re.IGNORECASE):
            found = int(named[1])
        error = error.__cause__ or error.__context__
    return found
