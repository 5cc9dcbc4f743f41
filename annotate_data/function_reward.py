"""Rewards of a Python function, called in worker processes with a time limit: a rule, a unit test, a verifier."""

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue

import orjson

from annotate_data.parallel import in_parallel
from annotate_data.work import Score, Task
from baton.errors import InputError

WORKER = Path(__file__).with_name("function_worker.py")


def check_function(target: str) -> tuple[Path, str]:
    """`file.py:name` as (file, name). Raises InputError if there is no such file, or no such function in it."""
    file, _, name = target.rpartition(":")
    if not file or not name.isidentifier():
        raise InputError(f"--scorer function:{target}: expected function:FILE.py:NAME")
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--scorer function:{target}: {file}: {error.strerror}") from None
    except SyntaxError as error:
        raise InputError(f"--scorer function:{target}: {file}:{error.lineno}: {error.msg}") from None
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if name not in defined:
        raise InputError(f"--scorer function:{target}: {file} defines no function {name}, only: {', '.join(defined) or 'none'}")
    return Path(file), name


def imported_beside(file: Path) -> list[Path]:
    """The Python files in the folder of `file` that it imports, and those that they import; sorted, without `file` itself."""
    found: set[Path] = set()
    unread = [file]
    while unread:
        tree = ast.parse(unread.pop().read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        paths = {file.with_name(f"{name.partition('.')[0]}.py") for name in names}
        new = {path for path in paths if path.is_file()} - found - {file}
        found |= new
        unread += new
    return sorted(found)


class FunctionReward:
    """`name(prompts, responses, records) -> list of numbers`. Call it with tasks: it yields each missing response's score.

    The function is called once for each record, with lists of equal length: the prompt (as messages), response and record of
    each missing response. A call that takes longer than `seconds` is ended with its worker, and its responses have no score.
    """

    def __init__(self, target: str, workers: int, seconds: float):
        self.file, self.name = check_function(target)
        self.workers, self.seconds = workers, seconds
        self.idle: SimpleQueue[subprocess.Popen] = SimpleQueue()

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for _ in range(self.workers):
            self.idle.put(self.start())
        try:
            for scores in in_parallel(self.score, tasks, self.workers):
                yield from scores
        finally:
            while not self.idle.empty():
                stop(self.idle.get())

    def start(self) -> subprocess.Popen:
        command = [sys.executable, str(WORKER), str(self.file), self.name, str(os.getpid())]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def score(self, task: Task) -> list[Score]:
        """The scores of one record. Raises InputError, naming its id, if the function raises or gives no list of numbers."""
        request = {
            "prompts": [task.prompt] * len(task.missing),
            "responses": [task.responses[index] for index in task.missing],
            "records": [task.record] * len(task.missing),
        }
        worker = self.idle.get()
        line, expired = answer_within(self.seconds, worker, orjson.dumps(request) + b"\n")
        if line:
            self.idle.put(worker)
            return [Score(task, index, reward) for index, reward in zip(task.missing, self.rewards(task, line), strict=True)]
        stop(worker)
        self.idle.put(self.start())
        if not expired:
            raise InputError(f"{self.named(task)} ended its process; see above")
        return [Score(task, index, None, f"{self.name} took longer than {self.seconds:g} s") for index in task.missing]

    def rewards(self, task: Task, line: bytes) -> list[float]:
        """The rewards in a worker's answer. Raises InputError for an error in it, or another number of rewards."""
        answer = orjson.loads(line)
        if "error" in answer:
            raise InputError(f"{self.named(task)} raised {answer['error']}")
        if len(answer["rewards"]) != len(task.missing):
            raise InputError(f"{self.named(task)} gave {len(answer['rewards'])} rewards for {len(task.missing)} responses")
        # NaN and infinities are null in JSON
        return [float("nan") if reward is None else reward for reward in answer["rewards"]]

    def named(self, task: Task) -> str:
        """The record and the function, for errors."""
        return f"{task.where}: prompt {task.record['id']}: {self.file}:{self.name}"


def answer_within(seconds: float, worker: subprocess.Popen, request: bytes) -> tuple[bytes, bool]:
    """A worker's answer to a request, empty if it has ended; and whether it was ended because `seconds` were over."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        worker.kill()

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        worker.stdin.write(request)
        worker.stdin.flush()
        return worker.stdout.readline(), expired.is_set()
    except BrokenPipeError:
        return b"", expired.is_set()
    finally:
        timer.cancel()


def stop(worker: subprocess.Popen) -> None:
    """End a worker process and wait for its end."""
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()
