"""A worker process of a scorer function: one JSON line in for each record, one out with its rewards or its error.

The first line out, before any comes in, says whether the file could be imported.

python function_worker.py FILE NAME PARENT_PID

It ends with the process that started it, however that one ends.
"""

import importlib.util
import os
import sys
import traceback

import orjson

from baton.program import die_with_parent


def load(file: str, name: str):
    """The function `name` of the Python file `file`."""
    spec = importlib.util.spec_from_file_location("scorer_function", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of their class while it is executed
    sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # so that it can import the files beside it
    spec.loader.exec_module(module)
    return getattr(module, name)


def main() -> None:
    die_with_parent()
    if os.getppid() != int(sys.argv[3]):  # it died before
        return
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)  # what the function reads is no request
    os.dup2(2, 1)  # what the function prints is log, not an answer
    # A process that the function forks neither reads requests, nor answers, nor keeps the pipes open after this one's end.
    os.register_at_fork(after_in_child=lambda: [os.dup2(nothing, pipe.fileno(), False) for pipe in (requests, answers)])
    try:
        function = load(sys.argv[1], sys.argv[2])
    except (Exception, SystemExit) as error:
        answers.write(failure(error))
        return
    answers.write(b"{}\n")
    for line in requests:
        request = orjson.loads(line)
        try:
            rewards = function(request["prompts"], request["responses"], request["records"])
            answer = orjson.dumps({"rewards": [float(reward) for reward in rewards]}) + b"\n"
        except BaseException as error:  # also SystemExit: a model's code may call exit()
            answer = failure(error)
        answers.write(answer)


def failure(error: BaseException) -> bytes:
    """The answer that says what was raised, and where: the program shows it, once for all workers."""
    text = "".join(traceback.format_exception(error)).rstrip()
    answer = {"error": type(error).__name__, "traceback": text.encode(errors="replace").decode()}
    return orjson.dumps(answer) + b"\n"


if __name__ == "__main__":
    main()
