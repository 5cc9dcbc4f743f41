"""Rewards of a Python function, called in worker processes with a time limit: a rule, a unit test, a verifier."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import orjson

from annotate_data.parallel import in_parallel
from annotate_data.work import Score, Task
from baton.errors import InputError
from baton.program import harmless
from baton.scorers import check_function

WORKER = Path(__file__).with_name("function_worker.py")
IMPORT_SECONDS = 900  # that a function's file may take to import: it may load a model


class Worker:
    """A process that calls the function; it imports the function's file first.

    It leads a process group of its own, so that what the function starts ends with it. Ctrl-C does not reach it there.
    `replaces`: it stands in for one that had imported the file.
    """

    def __init__(self, file: Path, name: str, replaces: bool = False):
        command = [sys.executable, str(WORKER), str(file), name, str(os.getpid())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self.imported, self.replaces = False, replaces
        self.refusal: InputError | None = None  # why the file was not imported: each caller is told, not the first alone

    def wait_for_import(self, file: Path) -> None:
        """Raise InputError if the file cannot be imported, or not in time; its import has a limit of its own."""
        if self.refusal:
            raise self.refusal
        if self.imported:
            return
        line, expired = answer_within(IMPORT_SECONDS, self.process, b"")
        answer = orjson.loads(line) if line else {"traceback": "it ended its process; see above"}
        if expired:
            self.refusal = InputError(f"{file}: not imported after {IMPORT_SECONDS} s")
        elif "traceback" in answer:
            self.refusal = InputError(f"{file}: cannot be imported:\n{shown(answer['traceback'])}")
        if self.refusal:
            raise self.refusal
        self.imported = True


class FunctionReward:
    """`name(prompts, responses, records) -> list of numbers`. Call it with tasks: it yields each missing response's score.

    The function is called once for each record, with lists of equal length: the prompt (as messages), response and record of
    each missing response. A call that takes longer than `seconds` is ended with its worker; its responses have no score, but
    may have one with more time. So may those that meet a new worker which cannot import the file. Where the function raises an
    exception, they have none for good.
    """

    def __init__(self, target: str, workers: int, seconds: float):
        self.file, self.name = check_function(target)
        self.workers, self.seconds = workers, seconds
        self.idle: SimpleQueue[Worker] = SimpleQueue()
        self.called: set[Worker] = set()

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        self.start()
        try:
            for scores in in_parallel(self.score, tasks, self.workers, self.end_calls):
                yield from scores
        finally:
            while not self.idle.empty():
                stop(self.idle.get().process)

    def end_calls(self) -> None:
        """End the calls under way with their workers."""
        for worker in list(self.called):
            kill(worker.process)

    def start(self) -> None:
        """Start the workers. A service, which calls `score` whenever a request comes, starts them once."""
        for _ in range(self.workers):
            self.idle.put(Worker(self.file, self.name))

    def wait_for_imports(self) -> None:
        """Wait until each worker has imported the file. Raises InputError if one cannot."""
        for _ in range(self.workers):
            worker = self.idle.get()
            worker.wait_for_import(self.file)
            self.idle.put(worker)

    def score(self, task: Task) -> list[Score]:
        """The scores of one record.

        Raises InputError, naming its id, if the function gives no list of numbers, or the record cannot be sent to a worker.
        """
        request = {
            "prompts": [task.prompt] * len(task.missing),
            "responses": [task.responses[index] for index in task.missing],
            "records": [task.record] * len(task.missing),
        }
        try:
            line = orjson.dumps(request) + b"\n"
        except TypeError as error:  # an integer of more than 64 bits, half of a surrogate pair
            raise InputError(harmless(f"{self.named(task)}: cannot be given this record: {error}")) from None
        worker = self.idle.get()
        self.called.add(worker)
        try:
            return self.scores_by(worker, task, line)
        finally:
            self.called.discard(worker)

    def scores_by(self, worker: Worker, task: Task, request: bytes) -> list[Score]:
        """The scores by a worker, which is idle again after that, or else is replaced."""
        try:
            worker.wait_for_import(self.file)
        except InputError as error:
            if not worker.replaces:
                self.idle.put(worker)
                raise
            self.replace(worker)  # the file may be in the middle of a change
            return self.without_scores(task, f"a new process of {self.name} could not import the file", shown(str(error)))
        line, expired = answer_within(self.seconds, worker.process, request)
        if line and not expired:
            self.idle.put(worker)
            return self.scores(task, line)
        self.replace(worker)
        if not expired:
            raise InputError(f"{self.named(task)} ended its process; see above")
        return self.without_scores(task, f"{self.name} took longer than {self.seconds:g} s")

    def replace(self, worker: Worker) -> None:
        """End a worker, and put a new one into its place."""
        stop(worker.process)
        self.idle.put(Worker(self.file, self.name, replaces=True))

    def without_scores(self, task: Task, note: str, detail: str = "") -> list[Score]:
        """No scores now, though another try may give some."""
        return [Score(task, index, None, note, again=True, detail=detail) for index in task.missing]

    def scores(self, task: Task, line: bytes) -> list[Score]:
        """The scores in a worker's answer. Raises InputError for another number of rewards."""
        answer = orjson.loads(line)
        if "error" in answer:
            note = f"{self.name} raised {answer['error']}"
            return [Score(task, index, None, note, detail=shown(answer["traceback"])) for index in task.missing]
        if len(answer["rewards"]) != len(task.missing):
            raise InputError(f"{self.named(task)} gave {len(answer['rewards'])} rewards for {len(task.missing)} responses")
        # NaN and infinities are null in JSON
        values = [float("nan") if reward is None else reward for reward in answer["rewards"]]
        return [Score(task, index, value) for index, value in zip(task.missing, values, strict=True)]

    def named(self, task: Task) -> str:
        """The record and the function, for errors."""
        return f"{task.where}: prompt {task.record['id']}: {self.file}:{self.name}"


def shown(text: str) -> str:
    """A traceback as harmless characters: its message may quote what a model said."""
    return "\n".join(map(harmless, text.splitlines()))


def answer_within(seconds: float, worker: subprocess.Popen, request: bytes) -> tuple[bytes, bool]:
    """A worker's answer to a request, empty if it has ended; and whether it was ended because `seconds` were over."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        kill(worker)

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        worker.stdin.write(request)
        worker.stdin.flush()
        line = worker.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
    timer.join()  # it may be ending the worker right now, which then must not be called again
    return line, expired.is_set()


def stop(worker: subprocess.Popen) -> None:
    """End a worker process, with all that it has started, and wait for its end."""
    kill(worker)
    worker.wait()
    with suppress(BrokenPipeError):  # of a request that it did not read to the end
        worker.stdin.close()
    worker.stdout.close()


def kill(worker: subprocess.Popen) -> None:
    """Kill a worker process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
