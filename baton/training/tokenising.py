"""From records to rows of token ids, on all cores of the machine; a worker imports no more than a tokenizer needs."""

import logging
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

from baton import program
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.progress import Progress

log = logging.getLogger("baton")

Row = dict[str, Any]
Where = tuple[str, Record]  # ("file:line", what is there)
# A function or `partial` of one of a module: `make(records, drops, counted)` yields the rows of records, in order.
Make = Callable[[Iterable[Where], Drops, Counter[str]], Iterator[Row]]

CHUNK = 100  # records that a worker takes at a time: a few tenths of a second
FEW = 2000  # records that one process tokenises in less time than workers take to start and to pay off
MOST_WORKERS = 16  # about as many as one process can feed and write after


def tokenised(
    make: Make, records: Iterable[Where], drops: Drops, counted: Counter[str], total: int | None = None
) -> Iterator[Row]:
    """Yield the rows that `make` gives of `records`, in order. Raises the error of the earliest record that has one.

    Where there are more than a `FEW` records, processes of their own make the rows, one on each core; a few chunks of records
    are in memory at a time. Rows, drops and counts are those of a single process, in its order.

    Args:
        drops, counted: get what `make` adds to them.
        total: how many records there are, if it is known, for the progress.
    """
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    records = iter(records)
    first, failure = _read(records, FEW)
    if failure or len(first) < FEW or workers == 1:
        yield from make(chain(first, records if failure is None else _raising(failure)), drops, counted)
        return
    log.info("tokenising in %d processes", workers)
    progress = Progress(total, "records")
    said: set[str] = set()
    for made in _in_workers(make, chain(first, records), workers):
        for reason, name in made.dropped:
            drops.add(reason, name)
        counted.update(made.counted)
        for level, template, text in made.logged:
            if template not in said:  # each worker says it the first time
                said.add(template)
                log.log(level, "%s", text)
        progress.update(made.records)
        yield from made.rows
    progress.close()


class Made(NamedTuple):
    """What a worker makes of a chunk of records."""

    records: int
    rows: list[Row]
    dropped: list[tuple[str, str]]  # (reason, name)
    counted: Counter[str]
    logged: list[tuple[int, str, str]]  # (level, template, text)


def _in_workers(make: Make, records: Iterator[Where], workers: int) -> Iterator[Made]:
    """Yield what workers make of `records`, chunk by chunk, in order."""
    # Spawned: this process has threads (of torch, of tokenizers), which a forked one would lack.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(make, os.getpid()))
    try:
        running: deque[Future[Made]] = deque()
        failure: InputError | None = None
        while failure is None:
            chunk, failure = _read(records, CHUNK)
            if not chunk:
                break
            with _interrupts_held():  # workers inherit that, and are started here
                running.append(pool.submit(_work, chunk))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
        if failure:
            raise failure
    except BrokenProcessPool:
        raise InputError(
            f"one of {workers} tokenising processes was killed, mostly for lack of memory: let this program have fewer cores "
            "(`taskset --cpu-list 0 …`) or more memory, and run the same command again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Context in which an interrupt waits for its end, in this process and for good in those that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read(records: Iterator[Where], count: int) -> tuple[list[Where], InputError | None]:
    """The next `count` records, or those before the first bad one, with its error: theirs come first."""
    found: list[Where] = []
    try:
        for record in islice(records, count):
            found.append(record)
    except InputError as error:
        return found, error
    return found, None


def _raising(error: InputError) -> Iterator[Where]:
    raise error
    yield


# In a worker:


class _Dropped(list):
    """Takes the place of `Drops`, which log, in a worker."""

    def add(self, reason: str, name: str) -> None:
        self.append((reason, name))


class _Logged(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append((record.levelno, record.msg, record.getMessage()))


def _begin(make: Make, parent: int) -> None:
    """Prepare a worker: it ends with its parent, which alone is interrupted from a terminal (`_interrupts_held`)."""
    global _make, _logged
    program.die_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    _make, _logged = make, _Logged()
    log.addHandler(_logged)
    log.propagate = False


def _work(chunk: list[Where]) -> Made:
    _logged.records = []
    dropped, counted = _Dropped(), Counter()
    rows = list(_make(chunk, dropped, counted))
    return Made(len(chunk), rows, list(dropped), counted, _logged.records)
