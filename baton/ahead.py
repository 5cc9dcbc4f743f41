"""Looking ahead, for `--check`: what stage programs would do, found out without doing any of it.

The programs of a whole run are looked at in order and in one process. What one would make, such as a round's policy, is not
there yet: for those after it, it stands for itself (`will_be_made`).
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import InputError, looked_in

UP_TO_DATE, RESUMES = "up to date", "going on where it stopped"
WAITS = "not known: an earlier stage, whose output this one was made from, has to be put right first"

Check = Callable[[], object]  # raises InputError


@dataclass
class Outlook:
    """What the programs that this process has looked at would do.

    `planned` says it for each output, by its full path; where work is to be done, the output is also in `to_make`. `checks`
    are those that need heavy imports, one of a kind: they are made once, after all others. `adapters` are outputs that will
    hold an adapter without its model; `refused` those whose programs refuse, and what was made from them.
    """

    planned: dict[Path, str] = field(default_factory=dict)
    to_make: set[Path] = field(default_factory=set)
    checks: dict[str, Check] = field(default_factory=dict)
    adapters: set[Path] = field(default_factory=set)
    refused: set[Path] = field(default_factory=set)
    several: bool = False  # whether other programs follow
    starts: bool = False  # whether the programs start now, here, if nothing is wrong


OUTLOOK = Outlook()


def note(output: Path, planned: str) -> None:
    """Remember what is planned for an output: `up to date`, or what is to be done."""
    OUTLOOK.planned[output.resolve()] = planned
    if planned == WAITS:
        OUTLOOK.refused.add(output.resolve())
    if not planned.startswith(UP_TO_DATE):
        OUTLOOK.to_make.add(output.resolve())


def will_be_made(source: str | Path) -> bool:
    """Whether a program that was looked at would make `source`, or the folder that it is in."""
    return _is_in(OUTLOOK.to_make, source)


def is_up_to_date(source: str | Path) -> bool:
    """Whether a program that was looked at would find `source` made already."""
    return OUTLOOK.planned.get(Path(source).resolve(), "").startswith(UP_TO_DATE)


def is_refused(source: str | Path) -> bool:
    """Whether the program that would make `source`, or the folder that it is in, refuses to, or waits for one that does."""
    return _is_in(OUTLOOK.refused, source)


def _is_in(outputs: set[Path], source: str | Path) -> bool:
    path = Path(source).resolve()
    return not outputs.isdisjoint((path, *path.parents))


def note_adapter(output: Path) -> None:
    """Remember that `output` will hold an adapter without its model."""
    OUTLOOK.adapters.add(output.resolve())


def will_be_adapter(model: str | Path) -> bool:
    """Whether a program that was looked at would make `model` an adapter without its model."""
    return Path(model).resolve() in OUTLOOK.adapters


def starts_here() -> bool:
    """Whether the programs that are looked at start now on this machine, if nothing is wrong."""
    return OUTLOOK.starts


def later(kind: str, check: Check) -> None:
    """Make a check that needs heavy imports: now for one program alone, and once for all of its kind where several follow."""
    OUTLOOK.checks.setdefault(kind, check)
    if not OUTLOOK.several:
        make_checks()


def accept(kind: str) -> None:
    """Remember that the check of this kind was passed before, when the work began."""
    OUTLOOK.checks.setdefault(kind, lambda: None)


def make_checks() -> None:
    """Make the checks that were put off."""
    for check in OUTLOOK.checks.values():
        check()


def check_there(source: str | Path, name: str) -> None:
    """Raise InputError where an input is a local path with nothing there, and nothing will be made there."""
    if is_local(source) and not Path(source).exists() and not will_be_made(source):
        raise InputError(f"{source}: no such file or folder (the input `{name}`){looked_in(source)}")


def is_local(source: str | Path) -> bool:
    """Whether a source can only be a path of this machine, and no name of the hub."""
    path = Path(source)
    return path.exists() or str(source).startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".gz", ".parquet")


def look(words: Sequence[str]) -> list[str]:
    """Look at what the stage program with these words (a file and its arguments) would do; returns what is planned.

    Its `main` runs here with `--check`. Raises InputError where the program would.
    """
    before = dict(OUTLOOK.planned)
    with command_line([*words, "--check"]):
        runpy.run_path(words[0])["main"]()
    return [planned for output, planned in OUTLOOK.planned.items() if output not in before]


@contextmanager
def command_line(words: Sequence[str]):
    """Context in which the words of a program are those of this process."""
    kept = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = kept
