"""Promises 2, 3 and 4: complete outputs or none, a manifest beside each, resume, every record counted.

stage = Stage.begin("annotate", arguments, output, {"dataset": path, "model": path})
if stage is None:
    return                      # up to date: said so, nothing to do
...                             # load the model; write to partial records or into `stage.partial_folder`
stage.finish(records_in=n, records_out=m, drops=drops, tokens=t)
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baton import ahead, program
from baton.ahead import RESUMES, UP_TO_DATE, WAITS
from baton.arguments import StageArguments
from baton.drops import Drops
from baton.errors import InputError, looked_in
from baton.locks import Lock
from baton.manifest import in_progress, manifest_path, put_aside, read_manifest, remove, write_manifest
from baton.partial import part_files
from baton.task import differences, fingerprints, task_of, trainer_settings

log = logging.getLogger("baton")

COMPLETES = "complete but for its name"
STARTS = "starting"
REFUSES_FINISHED, REFUSES_UNFINISHED = "refuses to replace it", "refuses to mix with it"

NOTHING, SAME, OTHER = "nothing", "the same task", "another task"

# What is done, by what the finished output and the unfinished work are results of.
PLANS = {
    (NOTHING, NOTHING): STARTS,
    (NOTHING, SAME): RESUMES,
    (NOTHING, OTHER): REFUSES_UNFINISHED,
    **{(SAME, unfinished): UP_TO_DATE for unfinished in (NOTHING, SAME, OTHER)},
    **{(OTHER, unfinished): REFUSES_FINISHED for unfinished in (NOTHING, SAME, OTHER)},
}


class Stage:
    """One run of a stage program, from checked arguments to a finished output with its manifest."""

    def __init__(self, output: Path, manifest: dict[str, Any], lock: Lock | None = None):
        self.output, self.manifest, self.lock = output, manifest, lock
        self.start = time.monotonic()

    @classmethod
    def begin(
        cls,
        name: str,
        arguments: StageArguments,
        output: Path,
        inputs: dict[str, str | Path],
        settings: dict[str, Any] | None = None,
        config_class: Callable[[], type] | None = None,
        check: Callable[["Stage"], object] | None = None,
    ) -> "Stage | None":
        """Start or resume the work on `output`, or return None (and say so) where it is up to date, or for `--check`.

        `settings` decide the result beside the arguments; where `config_class` gives a trainer's configuration, they are its
        settings as the user wrote them. `check` is what `--check` also calls where there is work to do, and `--overwrite`
        before it replaces anything: what needs heavy imports and raises InputError. Where work starts afresh, what `output`
        held before is kept as `<output>.old` until the new output is complete. Raises InputError where `output` holds, or is
        being given, the result of another task; the message names the differences.
        """
        settings = dict(settings or {})
        task = task_of(name, arguments, trainer_settings(settings) if config_class else settings)
        refuse_own_input(output, inputs)
        defaults = type(arguments).model_construct().model_dump(mode="json")

        def is_other(manifest: dict[str, Any]) -> list[str]:
            return differences(manifest, task, inputs, config_class, defaults)

        def plan() -> str:
            return plan_for(output, arguments.overwrite, is_other)

        stage = cls(output, task, Lock(output.with_name(output.name + ".partial.lock")))
        if arguments.check:
            planned = look_ahead(output, inputs, arguments.overwrite, plan)
            # Rounds share a trainer's configuration, and where work has begun it was accepted.
            kind = f"{name} {task['settings'] if config_class else output}"
            if config_class and planned in (UP_TO_DATE, RESUMES, COMPLETES):
                ahead.accept(kind)
            elif check and planned != UP_TO_DATE:
                ahead.later(kind, lambda: check(stage))
            return None
        planned = plan()
        if planned == STARTS:
            for name, source in inputs.items():
                ahead.check_there(source, name)
        if check and arguments.overwrite:
            check(stage)  # what it refuses leaves the old output, and unfinished work, where it is
        if program.rank() == 0 and planned != UP_TO_DATE:
            output.parent.mkdir(parents=True, exist_ok=True)
            if not stage.lock.take():
                raise InputError(f"{output}: another process is working on it{stage.lock.holder()}; wait for it or stop it")
            planned = plan()  # another process may have finished the work before the lock was ours
        log.info("%s: %s", output, planned)
        if program.rank() == 0:
            stage._carry_out(planned, inputs)
        return None if planned in (UP_TO_DATE, COMPLETES) else stage

    @property
    def partial_folder(self) -> Path:
        """Where a stage whose output is a folder works: `<output>.partial`."""
        return in_progress(self.output)

    def finish(
        self,
        *,
        records_in: int,
        records_out: int,
        drops: Drops | None = None,
        scratch: Sequence[str] = (),
        **facts: Any,
    ) -> None:
        """Give a partial folder its final name, write the manifest, log the account.

        What matches `scratch` in the partial folder is deleted. `facts` (tokens, metrics, …) go into the manifest as they are;
        its seconds are those of this process. To be called by process 0 alone.
        """
        account = self._account(records_in, records_out, drops or Drops(), facts | {"scratch": list(scratch)})
        write_manifest(in_progress(self.output), self.manifest)  # after a death from here on, only `_complete` is left to do
        self._complete()
        log.info("%s", account)

    def _account(self, records_in: int, records_out: int, drops: Drops, facts: dict[str, Any]) -> str:
        """Put the account into the manifest; returns it as a line of the log. Raises RuntimeError where records are missing."""
        if records_in != records_out + drops.counts.total():
            raise RuntimeError(f"{self.output}: {records_in} records in, but {records_out} out and dropped: {drops}")
        counts = {"in": records_in, "out": records_out, "dropped": dict(drops.counts)}
        seconds = round(time.monotonic() - self.start, 2)
        self.manifest |= {"counts": counts, "dropped": drops.names, "seconds": seconds, **facts}
        return f"{self.output}: {records_in} in, {records_out} out, dropped: {drops}; {seconds:.1f} s"

    def _complete(self) -> None:
        """Give a complete output its name and its manifest. Any part of this may have been done before."""
        scratch = self.manifest.pop("scratch", [])
        if self.partial_folder.is_dir():
            for path in [path for pattern in scratch for path in self.partial_folder.glob(pattern)]:
                remove(path)
            remove(self.output)
            self.partial_folder.replace(self.output)
        write_manifest(self.output, self.manifest)
        remove(put_aside(self.output))
        remove_partial(self.output)
        if self.lock is not None:
            self.lock.release()

    def _carry_out(self, planned: str, inputs: dict[str, str | Path]) -> None:
        """Make the files ready for what is planned; to be called by process 0 alone."""
        if planned == UP_TO_DATE:
            remove_partial(self.output)
            self.lock.release()
        elif planned == STARTS:
            self._start_afresh(inputs)
        else:
            self.manifest = read_manifest(in_progress(self.output))
            if planned == COMPLETES:
                self._complete()

    def _start_afresh(self, inputs: dict[str, str | Path]) -> None:
        """Write the manifest of work in progress, and put aside the output that was there before.

        In this order a death at any point leaves either the old output with its manifest, or the new work begun, and
        nobody takes the one for the other.
        """
        self.manifest = started(self.manifest, inputs)
        remove_partial(self.output)
        write_manifest(in_progress(self.output), self.manifest)
        replace_output(self.output)


def plan_for(output: Path, overwrite: bool, differences_of: Callable[[dict[str, Any]], list[str]]) -> str:
    """What to do for `output`: UP_TO_DATE, RESUMES or STARTS. Raises InputError where it is in the way.

    `differences_of` says in what the task of a manifest differs from the one to be done.
    """
    if overwrite:
        manifests = (manifest_path(output), manifest_path(in_progress(output)))
        if output.is_dir() and not any(manifest.exists() for manifest in manifests):
            raise InputError(f"{output}: a folder that no stage made; name another, or remove it yourself")
        return STARTS
    finished = read_manifest(output) if output.exists() else None
    unfinished = read_manifest(in_progress(output))
    found = [None if manifest is None else differences_of(manifest) for manifest in (finished, unfinished)]
    states = tuple(NOTHING if other is None else OTHER if other else SAME for other in found)
    planned = PLANS[states]
    if planned == RESUMES and "counts" in unfinished and (output.exists() or in_progress(output).is_dir()):
        return COMPLETES
    if planned == STARTS and output.exists():
        raise InputError(f"{output}: exists, and no manifest says that this stage made it; --overwrite replaces it")
    if planned == REFUSES_FINISHED:
        raise InputError(f"{output}: finished, of another task: {'; '.join(found[0])}; --overwrite replaces it")
    if planned == REFUSES_UNFINISHED:
        if not keeps_work(output, unfinished) and not output.exists():
            return STARTS
        raise InputError(
            f"{output}: unfinished work of another task: {'; '.join(found[1])}; go on with the same arguments, or start afresh "
            "with --overwrite"
        )
    return planned


def keeps_work(output: Path, manifest: dict[str, Any]) -> bool:
    """Whether unfinished work holds what would be lost: records, a training's checkpoint or log-probabilities, a whole output.

    A stage that failed before its first record or checkpoint leaves none of them.
    """
    parts = part_files(output)
    records = any(part.is_file() and part.stat().st_size for part in parts)
    folders = any(any(part.glob("checkpoint-*")) or any(part.glob("*.partial*")) for part in parts)
    return "counts" in manifest or records or folders


def look_ahead(output: Path, inputs: dict[str, str | Path], overwrite: bool, plan: Callable[[], str]) -> str:
    """What `plan` says for `--check`, logged, and noted for the programs that follow.

    Raises InputError for an input that is not there, and for an output that was made from an input which will be made anew.
    """
    for name, source in inputs.items():
        ahead.check_there(source, name)
    changing = {name: source for name, source in inputs.items() if ahead.will_be_made(source)}
    planned = STARTS if changing else plan()
    unfinished = read_manifest(in_progress(output)) or {}
    if changing and not overwrite and (output.exists() or keeps_work(output, unfinished)):
        if not any(map(ahead.is_refused, changing.values())):
            made_from = ((read_manifest(output) if output.exists() else None) or unfinished).get("inputs", changing)
            if not changing.keys() & made_from.keys():
                plan()  # refuses it too: it is another stage's
            raise InputError(
                f"{output}: made from an earlier {next(iter(changing.values()))}, which is to be made anew: move {output} "
                "away, or delete it, and run the same command again"
            )
        planned = WAITS  # not a mistake of its own
    log.info("%s: %s", output, planned)
    ahead.note(output, planned)
    return planned


def refuse_own_input(output: Path, inputs: dict[str, str | Path]) -> None:
    """Raise InputError if an output would replace or hold one of the inputs, or lie in a folder that is called `~`."""
    if output.parts[:1] == ("~",):
        raise InputError(f"{output}: would lie in a folder called ~{looked_in(output)}")
    for name, source in inputs.items():
        target, given = output.resolve(), Path(source).resolve()
        if target in (given, *given.parents):
            raise InputError(f"{output}: the output cannot replace or hold the input `{name}` ({source})")
        if given.is_dir() and given in target.parents:
            raise InputError(f"{output}: the output cannot lie in the input `{name}` ({source}), which it would change")


def started(task: dict[str, Any], inputs: dict[str, str | Path]) -> dict[str, Any]:
    """The manifest of a task that starts now."""
    facts = {"versions": program.versions(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return {**task, "inputs": fingerprints(inputs), **facts}


def replace_output(output: Path) -> None:
    """Put aside a finished output, which new work is to replace; it has no manifest from here on."""
    manifest_path(output).unlink(missing_ok=True)
    if output.exists():
        old = put_aside(output)
        remove(old)
        output.replace(old)
        log.info("%s: kept until the new output is complete", old)


def remove_partial(output: Path) -> None:
    """Delete the unfinished work on an output; the manifest last, so that a death in between is harmless."""
    for part in part_files(output):
        remove(part)
    manifest_path(in_progress(output)).unlink(missing_ok=True)
