"""Many slow calls at a time, over threads, with a bound on how far the input is read ahead."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `function(item)` as each is done, in any order. The first exception ends it; nothing new is started then."""
    running: set[Future[R]] = set()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                running.add(pool.submit(function, item))
                if len(running) >= 2 * workers:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        finally:
            for future in running:
                future.cancel()
