"""Scorers that wait for requests: models score those that arrive together in common batches, the others call by call."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from annotate_data.work import Score, Scorer, Task
from baton.scorers import KINDS_ON_GPU

WINDOW = 1024  # requests that are scored together

# Takes the tasks of one request; what the futures hold, one after the other, are the scores in the order of the responses.
Submit = Callable[[list[Task]], list[Future[list[Score]]]]


class Request(NamedTuple):
    """Tasks that wait for a model."""

    scorer: Scorer
    tasks: list[Task]
    scores: Future[list[Score]]


def started(scorers: dict[str, tuple[str, Any]]) -> dict[str, Submit]:
    """How requests are given to each scorer; `scorers` holds kind and scorer by name.

    All models share one thread, since they share a device. A function's workers have imported its file when this returns.
    Raises InputError if one cannot.
    """
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=score_forever, args=(waiting,), daemon=True).start()
    return {
        name: in_batches(scorer, waiting) if kind in KINDS_ON_GPU else in_calls(kind, scorer)
        for name, (kind, scorer) in scorers.items()
    }


def in_batches(scorer: Scorer, waiting: "queue.SimpleQueue[Request]") -> Submit:
    """Give requests to a model."""

    def submit(tasks: list[Task]) -> list[Future[list[Score]]]:
        request = Request(scorer, tasks, Future())
        waiting.put(request)
        return [request.scores]

    return submit


def in_calls(kind: str, scorer: Any) -> Submit:
    """Give requests to a function, a service or a judge, `scorer.workers` calls at once: a slow call holds up no other."""
    pool = ThreadPoolExecutor(scorer.workers)
    if kind == "judge":  # a call for each response
        return lambda tasks: [pool.submit(lambda *one: [scorer.score(one)], task, i) for task in tasks for i in task.missing]
    if kind == "function":
        scorer.start()
        scorer.wait_for_imports()
    return lambda tasks: [pool.submit(scorer.score, task) for task in tasks]


def score_forever(waiting: "queue.SimpleQueue[Request]") -> None:
    """Score all requests that wait, up to WINDOW of them together; those that arrive meanwhile are scored next."""
    while True:
        taken = [waiting.get()]
        while len(taken) < WINDOW and not waiting.empty():
            taken.append(waiting.get())
        taken = [request for request in taken if request.scores.set_running_or_notify_cancel()]
        for scorer in dict.fromkeys(request.scorer for request in taken):
            score_together(scorer, [request for request in taken if request.scorer is scorer])


def score_together(scorer: Scorer, requests: list[Request]) -> None:
    """Score the tasks of several requests in common batches. Where that fails, each is scored alone: one of them is bad."""
    try:
        scores = list(scorer(task for request in requests for task in request.tasks))
    except Exception as error:
        if len(requests) == 1:
            requests[0].scores.set_exception(error)
            return
        for request in requests:
            score_together(scorer, [request])
        return
    for request in requests:
        request.scores.set_result(in_order(request.tasks, scores))


def in_order(tasks: list[Task], scores: list[Score]) -> list[Score]:
    """The scores of `tasks` among `scores`, in the order of the responses."""
    found = {(score.task.position, score.index): score for score in scores}
    return [found[task.position, index] for task in tasks for index in task.missing]
