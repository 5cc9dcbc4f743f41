"""Several programs in one process, one after another, so that libraries are imported and models loaded once.

    python -m baton.launch.stages LOG COUNT PROGRAM [ARGUMENT ...] LOG COUNT PROGRAM [ARGUMENT ...] ...

For each program: its log (an empty word: none), the number of its words, the words. The launcher starts this (`unit.chained`).
Every stage has its own arguments, environment variables and log. The chain ends at the first that fails, with its exit code,
but goes on after one that finished without some records. Of several processes each runs the whole chain. As long as a chain has
to wait for its turn, it imports the libraries that its programs name in IMPORTS.
"""

import contextlib
import gc
import importlib
import logging
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path

from baton import ahead, program
from baton.errors import FailuresListed, UnitFailed
from baton.launch.local import CHILD
from baton.launch.plan import is_complete, is_stage
from baton.launch.processes import POLL_SECONDS
from baton.launch.unit import DONE, GO, READY

log = logging.getLogger("baton")

FOLLOWING: list[list[str]] = []  # the words of the programs that this process runs after the current one


def run(words: Sequence[str]) -> None:
    """Run the programs that the words name. Raises what the first that fails raises."""
    folder, stages = Path(os.environ[program.CHAIN]), list(_stages(words))
    if not (folder / GO).exists():
        _import_libraries([program_words for _, program_words in stages])
        (folder / READY).touch()
    try:
        _wait_until((folder / GO).exists)
    except KeyboardInterrupt:  # a stage before these has failed: there is nothing to say of those that never began
        sys.exit(130)
    for number, (place, program_words) in enumerate(stages):
        # The first process alone writes what the next program reads.
        _wait_until(lambda number=number: program.rank() == 0 or _count(folder / DONE) >= number)
        FOLLOWING[:] = [later for _, later in stages[number + 1 :]]
        if place:
            _write_to(Path(place))
        with _own_variables():
            code = _run_stage(program_words)
        _free_memory()
        if program.rank() == 0:
            with (folder / DONE).open("a", encoding="ascii") as file:
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
        if not is_complete(_without_overwrite(words)):
            raise
        log.error("%s", failure)
        return failure.exit_code
    return 0


def _without_overwrite(words: Sequence[str]) -> list[str]:
    """The words of a program without `--overwrite` and its value, where it has one."""
    values = {place + 1 for place, word in enumerate(words) if word == "--overwrite"}
    return [
        word
        for place, word in enumerate(words)
        if word.partition("=")[0] != "--overwrite" and (place not in values or word.startswith("-"))
    ]


def _free_memory() -> None:
    """Give back what a stage has left: models refer to themselves, and the GPU's memory is needed by the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _stages(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (log, words) of each program."""
    rest = iter(words)
    for place in rest:
        count = int(next(rest))
        yield place, list(islice(rest, count))


def _import_libraries(programs: Sequence[list[str]]) -> None:
    """Import what the programs that are stages name in IMPORTS. What is wrong with a module is said by the program itself."""
    for file in {words[0] for words in programs if is_stage(Path(words[0]))}:
        for name in runpy.run_path(file).get("IMPORTS", ()):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(POLL_SECONDS)


def _count(file: Path) -> int:
    """The lines of a file; 0 where there is none."""
    return len(file.read_bytes().splitlines()) if file.exists() else 0


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
