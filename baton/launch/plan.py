"""What the programs of a run would do, found out before the first one starts: which are up to date, and what is wrong.

All are looked at in order, in this process, with the checks that each makes before it loads anything: see baton/ahead.py.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton import ahead
from baton.errors import InputError
from baton.launch import gpus
from baton.launch.unit import ROOT, Unit, launcher_words, uses_accelerate
from baton.parallel import MODEL_PARALLEL_SIZES
from baton.program import LOCAL_RANK

RUNS, UNCHECKED = "would run", "would run; no stage of Baton's, so not checked"
NO_OVERWRITE = (
    "(run_loop.sh has no --overwrite: start another run with --run_dir, or move the rounds that are to be made anew out of the "
    "run's folder, with all later ones and their heldout/)"
)
OUTPUTS = ("--output_dir", "--pairs_path")  # what a unit would have made, where its program refuses


@dataclass
class Planned:
    """What is planned for a unit. `problem` keeps it from running; `checks` are to be made last, see `ahead.later`."""

    unit: Unit
    planned: str = RUNS
    problem: str | None = None
    checks: list[ahead.Check] = field(default_factory=list)

    @property
    def up_to_date(self) -> bool:
        return self.problem is None and self.planned == ahead.UP_TO_DATE


def plan(units: Iterable[Unit]) -> list[Planned]:
    """What each of `units` would do. Goes on after a problem, and takes what that unit would make for made."""
    ahead.OUTLOOK.several = True
    entries = [_look(unit) for unit in units]
    for entry in entries:
        if entry.unit.gpus > len(gpus.visible()):
            continue  # planned for another machine: a trainer's configuration refuses what this one has not
        for check in entry.checks:
            try:
                check()
            except InputError as error:
                entry.problem = str(error)
    return entries


def listing(entries: Sequence[Planned]) -> str:
    """The plan as text: of each unit its name, what it would do, and its command line, ready to paste after `in_env`."""
    lines = []
    for entry in entries:
        words = (entry.unit.environment, *launcher_words(entry.unit), *entry.unit.program)
        lines += [f"{entry.unit.name}: {entry.planned}", f"    in_env {shlex.join(words)}"]
        lines += [f"    {line}" for line in (entry.problem or "").splitlines()]
    done = sum(entry.up_to_date for entry in entries)
    lines.append(f"{len(entries)} stages, {done} of them up to date")
    return "\n".join(lines)


def problems(entries: Sequence[Planned]) -> str:
    """The problems of units, each once, with the names of the units that have it."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        if entry.problem:
            names.setdefault(entry.problem, []).append(entry.unit.name)
    said = [f"{', '.join(having)}: {problem}" for problem, having in names.items()]
    return "\n".join([*said, NO_OVERWRITE] if any("--overwrite" in problem for problem in names) else said)


def is_complete(words: Sequence[str]) -> bool:
    """Whether the output of the stage program with these words is there, complete; False for a program that is no stage.

    With `--overwrite` nothing ever is.
    """
    if not is_stage(Path(words[0])):
        return False
    kept, ahead.OUTLOOK = ahead.OUTLOOK, ahead.Outlook()
    try:
        found = ahead.look(words)
    except InputError:
        return False
    finally:
        ahead.OUTLOOK = kept
    return bool(found) and all(planned.startswith(ahead.UP_TO_DATE) for planned in found)


def _look(unit: Unit) -> Planned:
    entry, before = Planned(unit), set(ahead.OUTLOOK.checks)
    file = Path(unit.program[0])
    if not is_stage(file):
        entry.planned = UNCHECKED
        if not file.is_file():
            entry.problem = f"{unit.program[0]}: no such program"
        return entry
    try:
        with _variables(unit):
            found = ahead.look(unit.program)
    except InputError as error:
        entry.problem = str(error)
        _take_for_made(unit)
        return entry
    waiting = [planned for planned in found if not planned.startswith(ahead.UP_TO_DATE)]
    if not found:
        entry.planned = UNCHECKED
    elif ahead.WAITS in waiting:
        entry.planned = ahead.WAITS
    elif waiting:
        entry.planned = ahead.RESUMES if ahead.RESUMES in waiting or len(waiting) < len(found) else RUNS
    else:
        entry.planned = ahead.UP_TO_DATE
    entry.checks = [check for kind, check in ahead.OUTLOOK.checks.items() if kind not in before]
    return entry


def is_stage(file: Path) -> bool:
    """Whether a program is a stage, with `--check`. Of any other, also of one in the project's folder, nothing is looked at."""
    file = file.absolute()
    if ROOT not in file.parents or not file.is_file():
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return all(re.search(sign, text, re.MULTILINE) for sign in (r"^from baton\b", r"^ +(program\.)?run\(main\)"))


def _take_for_made(unit: Unit) -> None:
    """Have what a unit would make count as made, so that those after it have no problem for this reason alone."""
    for flag, value in zip(unit.program, unit.program[1:], strict=False):
        if flag in OUTPUTS:
            made = {Path(value).resolve(), Path(f"{value}.jsonl").resolve()}
            ahead.OUTLOOK.to_make |= made
            ahead.OUTLOOK.refused |= made


@contextlib.contextmanager
def _variables(unit: Unit) -> Iterator[None]:
    """The environment variables by which a program finds how many processes it is; the number of them decides its batch."""
    kept = dict(os.environ)
    os.environ |= unit.variables
    if uses_accelerate(unit):
        count = str(unit.processes)
        os.environ |= {LOCAL_RANK: "0", "RANK": "0", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= _parallel_sizes(unit.accelerate_config) if unit.gpus else {"ACCELERATE_USE_CPU": "true"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _parallel_sizes(accelerate_config: str | None) -> dict[str, str]:
    """The sizes of model-parallel groups in the file for `accelerate launch`, as its launcher passes them on."""
    if not accelerate_config or not Path(accelerate_config).is_file():
        return {}
    text = Path(accelerate_config).read_text(encoding="utf-8")
    found = {name: re.search(rf"^\s*{name.lower()}:\s*(\d+)", text, re.MULTILINE) for name in MODEL_PARALLEL_SIZES}
    return {name: match[1] for name, match in found.items() if match}
