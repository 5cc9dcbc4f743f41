"""Many slow calls at a time, over threads, with a bound on how far the input is read ahead."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    function: Callable[[T], R], items: Iterable[T], workers: int, end: Callable[[], None] = lambda: None
) -> Iterator[R]:
    """Yield `function(item)` as each is done, in any order.

    After an exception nothing new is started; it is raised once the calls under way are done and their results are yielded.
    Ctrl-C waits for those too; `end` is called to have them end at once.
    """
    items = iter(items)
    running: set[Future[R]] = set()
    failure: BaseException | None = None
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                room = 2 * workers - len(running) if failure is None else 0
                running |= {pool.submit(function, item) for item in islice(items, room)}
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    if error := future.exception():
                        failure = failure or error
                    else:
                        yield future.result()
                if failure:
                    running = {future for future in running if not future.cancel()}
        finally:
            for future in running:
                future.cancel()
            if running:
                end()
    if failure:
        raise failure
