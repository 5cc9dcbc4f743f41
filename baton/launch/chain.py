"""Several programs in one process, one after another, so that libraries are imported and models loaded once.

    python -m baton.launch stages LOG COUNT PROGRAM [ARGUMENT ...] LOG COUNT PROGRAM [ARGUMENT ...] ...

For each program: its log (an empty word: none), the number of its words, the words. The launcher starts this (`unit.chained`).
Every stage has its own arguments, environment variables and log. The chain ends at the first that fails, with its exit code,
but goes on after one that finished without some records. Of several processes each runs the whole chain.
"""

import contextlib
import logging
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path

from baton import ahead, program
from baton.errors import FailuresListed, UnitFailed
from baton.launch.local import CHILD
from baton.launch.plan import is_complete, is_stage
from baton.launch.processes import POLL_SECONDS

log = logging.getLogger("baton")

FOLLOWING: list[list[str]] = []  # the words of the programs that this process runs after the current one


def run(words: Sequence[str]) -> None:
    """Run the programs that the words name. Raises what the first that fails raises."""
    done, stages = Path(os.environ[program.CHAIN]), list(_stages(words))
    for number, (place, words) in enumerate(stages):
        _wait_for_first_process(done, number)
        FOLLOWING[:] = [words for _, words in stages[number + 1 :]]
        if place:
            _write_to(Path(place))
        with _own_variables():
            code = _run_stage(words)
        if program.rank() == 0:
            with done.open("a", encoding="ascii") as file:
                file.write(f"{code}\n")


def following(file: str) -> list[list[str]]:
    """The arguments of the programs that follow at once in this process and are the same `file`; none outside a chain."""
    same = takewhile(lambda words: Path(words[0]).resolve() == Path(file).resolve(), FOLLOWING)
    return [words[1:] for words in same]


def _run_stage(words: list[str]) -> int:
    """Run a program to its end; returns 3 where it finished without some records, else 0. Raises what the stage raises.

    One that is no stage of Baton's gets a process of its own. Raises UnitFailed where it fails.
    """
    if not is_stage(Path(words[0])):
        command = [sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), sys.executable, *words]
        code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
        if code:
            raise UnitFailed(f"{words[0]}: failed with exit code {code}", code if code > 0 else 128 - code)
        return 0
    try:
        with ahead.command_line(words):
            runpy.run_path(words[0])["main"]()
    except FailuresListed as failure:
        if not is_complete(words):
            raise
        log.error("%s", failure)
        return failure.exit_code
    return 0


def _stages(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (log, words) of each program."""
    rest = iter(words)
    for place in rest:
        count = int(next(rest))
        yield place, list(islice(rest, count))


def _wait_for_first_process(done: Path, number: int) -> None:
    """Wait until the first process has finished `number` programs: it alone writes what the next one reads."""
    while program.rank() and (len(done.read_bytes().splitlines()) if done.exists() else 0) < number:
        time.sleep(POLL_SECONDS)


def _write_to(place: Path) -> None:
    """Have all output of this process, and of those that it starts from here on, appended to a log."""
    place.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)


@contextlib.contextmanager
def _own_variables() -> Iterator[None]:
    """Context after which the environment variables are as before: what a stage sets for its libraries is its own."""
    kept = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)
