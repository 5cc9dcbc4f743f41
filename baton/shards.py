"""A task that several programs share, each sampling a shard: any number of shards goes on with the work of any other.

Shard i of n takes the positions `shard_range(total, i, n)` of the prompt set, and of those what no part holds. Its part is
`<prefix>.partial<i>-of-<n>`; the manifest of the task in progress is that of `<prefix>.partial`. A shard whose positions are
all finished is written to `<prefix><i>.jsonl`. The parts stay until all shards of one number are there, so nothing is lost
when the number changes before.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baton.ahead import RESUMES, UP_TO_DATE
from baton.arguments import StageArguments
from baton.drops import Drops
from baton.errors import InputError
from baton.locks import Lock
from baton.manifest import in_progress, manifest_path, put_aside, read_manifest, remove, write_manifest
from baton.partial import part_files
from baton.stage import STARTS, Stage, look_ahead, refuse_own_input, remove_partial, replace_output, started
from baton.task import differences, task_of

log = logging.getLogger("baton")


ONLY_NUMBER = "only_number_of_shards"  # in the manifest in progress: the number that can go on, where others lack the parts


class AtWork(InputError):
    """Another process is working on this shard, or on another number of shards."""


DifferencesOf = Callable[[dict[str, Any]], list[str]]  # in what a manifest is of another task than the one to be done


class Shard(Stage):
    """One run of a program that samples shard `index` of `count` of the task at `prefix`; made by `begin`."""

    def __init__(self, prefix: Path, index: int, count: int, task: dict[str, Any]):
        super().__init__(shard_path(prefix, index), task, Lock(_lock_path(prefix, index, count)))
        self.prefix, self.index, self.count = prefix, index, count

    @property
    def part(self) -> str:
        """The ending of this shard's part."""
        return f"{self.index}-of-{self.count}"

    @property
    def assembled(self) -> Path:
        """Where the shard's records are written in order, before `finish` gives them their name."""
        return self.output.with_name(f"{self.output.name}.assembled")

    def finish(self, *, records_in: int, records_out: int, drops: Drops | None = None, **facts: Any) -> None:
        """As `Stage.finish`; where this was the last shard to be finished, the parts of all are deleted.

        The manifest stands before its output: without it the output would be taken for one that no stage made, and with the
        manifest of another number of shards for that shard. Until both are there, the parts are all that counts.
        """
        account = self._account(records_in, records_out, drops or Drops(), facts | {"shard": [self.index, self.count]})
        with Lock(_lock_path(self.prefix)):
            remove(self.output)
            write_manifest(self.output, self.manifest)
            self.assembled.replace(self.output)
            remove(put_aside(self.output))
            self.lock.release()
            same = _of_task(shard_manifests(self.prefix), self.manifest)
            if finished_number(same) == self.count:
                _delete_leftovers(self.prefix, self.count)
        log.info("%s", account)


def begin(
    name: str,
    arguments: StageArguments,
    prefix: Path,
    index: int,
    count: int,
    inputs: dict[str, str | Path],
    check: Callable[[], object] = lambda: None,
) -> Shard | None:
    """Start or resume a shard, or return None (and say so) where it is finished, in this or another number of shards.

    `check` is called where there is work to do, also for `--check`, and raises InputError.

    Raises InputError where the shards at `prefix` are of another task, or where another program works on this shard or on
    another number of them. `<shard>.refused` then holds the message, so that merging does not take an old shard for this one.
    """
    shard = Shard(prefix, index, count, task_of(name, arguments, {}))
    if arguments.check:
        planned = look_ahead(shard.output, inputs, arguments.overwrite, lambda: _plan(shard, arguments.overwrite, inputs)[0])
        if not planned.startswith(UP_TO_DATE):
            check()
        return None
    shard.output.parent.mkdir(parents=True, exist_ok=True)
    with noting_refusal(prefix, index):
        planned = _plan_and_lock(shard, arguments.overwrite, inputs)
    refused_path(shard.output).unlink(missing_ok=True)
    log.info("%s: %s", shard.output, planned)
    if planned.startswith(UP_TO_DATE):
        return None
    check()
    return shard


def _plan(shard: Shard, overwrite: bool, inputs: dict[str, str | Path]) -> tuple[str, dict[str, Any] | None, list[str]]:
    """What is to be done; the manifest of the task in progress at the prefix; in what that one is another task."""
    refuse_own_input(shard.output, inputs)
    if in_progress(shard.prefix).is_dir():
        raise InputError(f"{in_progress(shard.prefix)}: the folder of a training; choose another --output_dir for the shards")
    task = shard.manifest

    def differences_of(manifest: dict[str, Any]) -> list[str]:
        return differences(manifest, task, inputs)

    begun = read_manifest(in_progress(shard.prefix))
    other = [] if begun is None else differences_of(begun)
    if not overwrite:
        if up_to_date := _finished(shard, None if other else begun, differences_of):
            return up_to_date, begun, other
        if other and part_files(shard.prefix):
            raise InputError(
                f"{shard.output}: unfinished work of another task: {'; '.join(other)}; go on with the same arguments, or "
                "start afresh with --overwrite"
            )
    return RESUMES if begun and not other and not overwrite else STARTS, begun, other


def _plan_and_lock(shard: Shard, overwrite: bool, inputs: dict[str, str | Path]) -> str:
    """What is to be done; where it is something, the shard's lock is taken and its place made ready."""
    with Lock(_lock_path(shard.prefix)):
        planned, begun, other = _plan(shard, overwrite, inputs)
        manifests = shard_manifests(shard.prefix)
        same = {index: known for index, known in manifests.items() if not differences(known, shard.manifest, inputs)}
        if planned.startswith(UP_TO_DATE):
            number = finished_number(same)
            if number and begun and not other:
                _delete_leftovers(shard.prefix, number)  # a program was killed before it could
            return planned
        _refuse_others_at_work(shard, any_number=bool(other))
        if not shard.lock.take():
            raise AtWork(f"{shard.output}: another process is working on it{shard.lock.holder()}; wait for it or stop it")
        if begun is None or other:
            remove_partial(shard.prefix)
            goes_on = not overwrite and bool(same)
            shard.manifest = started(shard.manifest, inputs) | {ONLY_NUMBER: shard.count if goes_on else None}
            write_manifest(in_progress(shard.prefix), shard.manifest)
        else:
            shard.manifest = begun
        if overwrite:
            _clear_place(shard)
        return planned


def _finished(shard: Shard, begun: dict[str, Any] | None, differences_of: DifferencesOf) -> str | None:
    """«up to date» of a shard, or of a whole task in another number of shards, that is finished; else None.

    `begun` is the manifest of this task in progress. Raises InputError where this shard is of another task, or, unless this
    task is in progress, where another shard is; and where only another number of shards can go on.
    """
    manifests = shard_manifests(shard.prefix)
    if shard.output.exists() and shard.index not in manifests:
        raise InputError(f"{shard.output}: exists, and no manifest says that this stage made it; --overwrite replaces it")
    other = {index: found for index, manifest in manifests.items() if (found := differences_of(manifest))}
    same = {index: manifest for index, manifest in manifests.items() if index not in other}
    number = finished_number(same)
    if same.get(shard.index, {}).get("shard") == [shard.index, shard.count]:
        return UP_TO_DATE
    if number:
        return f"{UP_TO_DATE}: the task is finished in {number} shards"
    in_the_way = [index for index in other if index == shard.index or begun is None]
    if in_the_way:
        place, found = shard_path(shard.prefix, in_the_way[0]), other[in_the_way[0]]
        raise InputError(
            f"{place}: finished, of another task: {'; '.join(found)}; to keep it, give another --output_dir, such as "
            f"{shard.prefix}_2; to replace it, add --overwrite"
        )
    # Without parts, what is finished stands in shards of their number alone.
    numbers = {manifest["shard"][1] for manifest in same.values()} if begun is None else {begun.get(ONLY_NUMBER)} - {None}
    if numbers - {shard.count}:
        number = min(numbers)
        raise InputError(
            f"{shard.output}: the task is finished in part, in {number} shards: run the missing ones with "
            f"--my_world_size {number}, or start afresh with --overwrite"
        )
    return None


def _refuse_others_at_work(shard: Shard, any_number: bool) -> None:
    """Raise InputError if another shard is being worked on: of another number of shards, or of this number too."""
    for index, count in _locked_shards(shard.prefix):
        if count == shard.count and (index == shard.index or not any_number):
            continue
        lock = Lock(_lock_path(shard.prefix, index, count))
        if not lock.take():
            raise AtWork(
                f"{shard.output}: another process is working on shard {index} of {count}{lock.holder()}; wait for it or stop "
                "it, and then run this command again"
            )
        lock.release()


def _clear_place(shard: Shard) -> None:
    """For overwriting: delete what this shard has sampled, and what another number of shards has; put its output aside."""
    for part in part_files(shard.prefix):
        if part.name.endswith(f".partial{shard.part}") or not part.name.endswith(f"-of-{shard.count}"):
            remove(part)
    replace_output(shard.output)


def _delete_leftovers(prefix: Path, count: int) -> None:
    """Of a task finished in `count` shards: delete the parts, what killed programs left, and the shards beyond `count`.

    Those are of a larger number of shards, or of a task that was overwritten.
    """
    for index in shard_manifests(prefix):
        if index >= count:
            remove(shard_path(prefix, index))
            manifest_path(shard_path(prefix, index)).unlink()
    for path in prefix.parent.iterdir():
        if re.fullmatch(rf"{re.escape(prefix.name)}\d+\.jsonl\.assembled(\.sorting)?", path.name):
            remove(path)
    for index, count in _locked_shards(prefix):
        lock = Lock(_lock_path(prefix, index, count))
        if lock.take():
            lock.release()
    remove_partial(prefix)


def shard_path(prefix: Path, index: int) -> Path:
    """The output of shard `index`."""
    return prefix.with_name(f"{prefix.name}{index}.jsonl")


def refused_path(shard: Path) -> Path:
    """The file that says that the last program that was to make `shard` refused to."""
    return shard.with_name(shard.name + ".refused")


def forget_refusals(prefix: Path) -> None:
    """Delete the word of refusals beside the finished shards at `prefix`: for a program that found them to be its task's."""
    for index in shard_manifests(prefix):
        refused_path(shard_path(prefix, index)).unlink(missing_ok=True)


@contextmanager
def noting_refusal(prefix: Path, index: int) -> Iterator[None]:
    """Context in which an InputError leaves word of it beside a finished shard, so that this is not merged as the new one."""
    try:
        yield
    except AtWork:
        raise
    except InputError as error:
        if prefix.name and (shard := shard_path(prefix, index)).exists():
            refused_path(shard).write_text(f"{error}\n", encoding="utf-8")
        raise


def shard_manifests(prefix: Path) -> dict[int, dict[str, Any]]:
    """The manifests of the finished shards at `prefix` by their index; files without one are left out."""
    found = {}
    for path in prefix.parent.glob("*.jsonl.manifest.json"):
        match = re.fullmatch(rf"{re.escape(prefix.name)}(\d+)\.jsonl\.manifest\.json", path.name)
        if match and shard_path(prefix, int(match[1])).exists():
            manifest = read_manifest(shard_path(prefix, int(match[1])))
            # Of `gen` and `gen1`, gen10.jsonl is shard 10 of the one or shard 0 of the other.
            if manifest is not None and manifest.get("shard", [None])[0] == int(match[1]):
                found[int(match[1])] = manifest
    return dict(sorted(found.items()))


def finished_number(manifests: dict[int, dict[str, Any]]) -> int | None:
    """In how many shards a task is finished as a whole, by its shards' manifests; None where shards of each number lack."""
    for count in {manifest["shard"][1] for manifest in manifests.values()}:
        if all(manifests.get(index, {}).get("shard") == [index, count] for index in range(count)):
            return count
    return None


def _of_task(manifests: dict[int, dict[str, Any]], manifest: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Those of `manifests` that are of the task of `manifest`."""
    return {index: other for index, other in manifests.items() if task_difference(manifest, other) is None}


def task_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first argument or input in which the tasks of two shards' manifests differ, as «name (other, not one)»; or None."""
    sides = []
    for manifest in (one, other):
        inputs = {f"the content of {name}": known["hash"] for name, known in manifest["inputs"].items()}
        sides.append({"stage": manifest["stage"], **manifest["arguments"], **inputs})
    first, second = sides
    for name in sorted(first.keys() | second.keys()):
        if first.get(name) != second.get(name):
            return f"{name} ({second.get(name)!r}, not {first.get(name)!r})"
    return None


def _locked_shards(prefix: Path) -> list[tuple[int, int]]:
    """(index, count) of the shards that have a lock file, held or left by a killed program."""
    pattern = re.compile(rf"{re.escape(_lock_path(prefix).name)}(\d+)-of-(\d+)")
    matches = [pattern.fullmatch(path.name) for path in prefix.parent.iterdir()]
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def _lock_path(prefix: Path, index: int | None = None, count: int | None = None) -> Path:
    ending = "" if index is None else f"{index}-of-{count}"
    return prefix.with_name(f"{prefix.name}.shards.lock{ending}")
