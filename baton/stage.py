"""Promises 2, 3 and 4: complete outputs or none, a manifest beside each, resume, every record counted.

stage = Stage.begin("generate", arguments, output, {"prompts": path, "model": path})
if stage is None:
    return                      # up to date: said so, nothing to do
...                             # load the model; write to partial records or into `stage.partial_folder`
stage.finish(records_in=n, records_out=m, drops=drops, tokens=t)
"""

import fcntl
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import orjson

from baton import program
from baton.arguments import StageArguments, identity
from baton.drops import Drops
from baton.errors import InputError
from baton.fingerprint import fingerprint, unchanged
from baton.partial import part_files

log = logging.getLogger("baton")

UP_TO_DATE, RESUMES, STARTS = "up to date", "going on where it stopped", "starting"


class Stage:
    """One run of a stage program, from checked arguments to a finished output with its manifest."""

    def __init__(self, name: str, output: Path, manifest: dict[str, Any]):
        self.name, self.output, self.manifest = name, output, manifest
        self.start = time.monotonic()
        self.lock = None

    @classmethod
    def begin(
        cls,
        name: str,
        arguments: StageArguments,
        output: Path,
        inputs: dict[str, str | Path],
        settings: dict[str, Any] | None = None,
    ) -> "Stage | None":
        """Start or resume the work on `output`, or return None (and say so) where it is up to date.

        `settings` are those of a library underneath, which decide the result as well. Where work starts afresh, what
        `output` held before is kept as `<output>.old` until the new output is complete. Raises InputError where `output`
        holds, or is being given, the result of other arguments or other input; the message names the difference.
        """
        asked = {"stage": name, "arguments": identity(arguments) | {"settings": dict(settings or {})}}
        stage = cls(name, output, asked)
        plan = _plan(asked, output, inputs, arguments.overwrite)
        if program.rank() == 0 and plan != UP_TO_DATE:
            output.parent.mkdir(parents=True, exist_ok=True)
            stage._lock()
            # Another process may have finished the work before the lock was ours.
            plan = _plan(asked, output, inputs, arguments.overwrite)
        log.info("%s: %s", output, plan)
        if program.rank() == 0:
            if plan == UP_TO_DATE:
                remove_partial(output)
                stage._unlock()
            elif plan == RESUMES:
                stage.manifest = read_manifest(in_progress(output))
            else:
                stage._start_afresh(inputs)
        return None if plan == UP_TO_DATE else stage

    @property
    def partial_folder(self) -> Path:
        """Where a stage whose output is a folder works: `<output>.partial`."""
        return self.output.with_name(self.output.name + ".partial")

    @property
    def _old(self) -> Path:
        return self.output.with_name(self.output.name + ".old")

    def finish(self, *, records_in: int, records_out: int, drops: Drops | None = None, **facts: Any) -> None:
        """Give a partial folder its final name, write the manifest, log the account.

        `facts` (tokens, metrics, …) go into the manifest as they are; its seconds are those of this process.
        To be called by process 0 alone.
        """
        drops = drops or Drops()
        if records_in != records_out + drops.counts.total():
            raise RuntimeError(f"{self.output}: {records_in} records in, but {records_out} out and dropped: {drops}")
        if self.partial_folder.is_dir():
            _remove(self.output)
            self.partial_folder.replace(self.output)
        seconds = round(time.monotonic() - self.start, 2)
        counts = {"in": records_in, "out": records_out, "dropped": dict(drops.counts)}
        self.manifest |= {"counts": counts, "dropped": drops.names, "seconds": seconds, **facts}
        _write_json(manifest_path(self.output), self.manifest)
        _remove(self._old)
        remove_partial(self.output)
        self._unlock()
        log.info("%s: %d in, %d out, dropped: %s; %.1f s", self.output, records_in, records_out, drops, seconds)

    def _start_afresh(self, inputs: dict[str, str | Path]) -> None:
        """Write the manifest of work in progress, and put aside the output that was there before.

        In this order a death at any point leaves either the old output with its manifest, or the new work begun, and
        nobody takes the one for the other.
        """
        self.manifest |= {
            "inputs": {key: fingerprint(value) for key, value in inputs.items()},
            "versions": program.versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        remove_partial(self.output)
        _write_json(manifest_path(in_progress(self.output)), self.manifest)
        manifest_path(self.output).unlink(missing_ok=True)
        if self.output.exists():
            _remove(self._old)
            self.output.replace(self._old)
            log.info("%s: kept until the new output is complete", self._old)

    def _lock(self) -> None:
        """Hold a lock on the output until this process ends, however it ends."""
        path = self.output.with_name(self.output.name + ".partial.lock")
        while True:
            self.lock = path.open("w")
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise InputError(f"{self.output}: another process is working on it; wait for it or stop it") from None
            try:
                if os.path.samestat(os.fstat(self.lock.fileno()), path.stat()):
                    return
            except FileNotFoundError:
                pass
            self.lock.close()  # its holder finished and removed the file after it was opened here

    def _unlock(self) -> None:
        if self.lock is not None:
            Path(self.lock.name).unlink(missing_ok=True)
            self.lock.close()


def manifest_path(output: Path) -> Path:
    """The manifest beside a finished output."""
    return output.with_name(output.name + ".manifest.json")


def in_progress(output: Path) -> Path:
    """The name under which the manifest of unfinished work stands: that of `<output>.partial`."""
    return output.with_name(output.name + ".partial")


def read_manifest(output: Path) -> dict[str, Any] | None:
    """The manifest beside `output`, or None. Raises InputError if it is not JSON."""
    path = manifest_path(output)
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}; --overwrite starts the stage afresh") from None


def remove_partial(output: Path) -> None:
    """Delete what unfinished work left behind; the manifest last, so that a death in between is harmless."""
    for part in part_files(output):
        _remove(part)
    manifest_path(in_progress(output)).unlink(missing_ok=True)


def _plan(asked: dict[str, Any], output: Path, inputs: dict[str, str | Path], overwrite: bool) -> str:
    """What to do for `output`: UP_TO_DATE, RESUMES or STARTS. Raises InputError where it is in the way."""
    for name, source in inputs.items():
        if output.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise InputError(f"{output}: the output cannot replace or hold the input `{name}` ({source})")
    finished, running = read_manifest(output), read_manifest(in_progress(output))
    if overwrite:
        if output.is_dir() and not finished and not running:
            raise InputError(f"{output}: a folder that no stage made; name another, or remove it yourself")
        return STARTS
    if finished and output.exists():
        if difference := _difference(finished, asked, inputs):
            raise InputError(f"{output}: finished with another {difference}; --overwrite replaces it")
        return UP_TO_DATE
    if running:
        difference = _difference(running, asked, inputs)
        if difference is None:
            return RESUMES
        if part_files(output) or output.exists():
            raise InputError(
                f"{output}: unfinished work with another {difference}; go on with the same, or start afresh with --overwrite"
            )
    elif output.exists():
        raise InputError(f"{output}: exists, and no manifest says that this stage made it; --overwrite replaces it")
    return STARTS


def _difference(manifest: dict[str, Any], asked: dict[str, Any], inputs: dict[str, str | Path]) -> str | None:
    """Name the first difference between what a manifest describes and what is asked for, or None."""
    if manifest["stage"] != asked["stage"]:
        return f"stage ({manifest['stage']}, now {asked['stage']})"
    old, new = ({**a, **a["settings"]} for a in (manifest["arguments"], asked["arguments"]))
    for name in sorted((old.keys() | new.keys()) - {"settings"}):
        if old.get(name) != new.get(name):
            return f"{name} ({old.get(name)!r}, now {new.get(name)!r})"
    for name, source in inputs.items():
        known = manifest["inputs"].get(name)
        if known is None or not unchanged(known, source):
            return f"{name}: the content of {source} is not what it was"
    for name in sorted(manifest["inputs"].keys() - inputs.keys()):
        return f"{name}: {manifest['inputs'][name]['path']} is not among the inputs now"
    return None


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".writing")
    partial.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
    partial.replace(path)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
