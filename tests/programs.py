"""Running the project's programs in tests as a user does: as processes, from the project's folder.

Importing vLLM or TRL takes longer than most tests. So the process of a program is forked from one that has this
environment's libraries imported (`libraries.py`) and has done nothing with them; the program runs in it from its first
line, as `__main__`, with its own arguments, environment and output.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.libraries"])


def start(*words, env=None, output=None):
    """Start `python WORDS…`; stdout and stderr go to the files of these names in the folder `output`, or nowhere.

    Returns the multiprocessing.Process: `exitcode` is None while it runs.
    """
    process = FORKS.Process(target=_become, args=(list(map(str, words)), dict(env or os.environ), output))
    process.start()
    return process


def run_program(*words, env=None, timeout=500):
    """Run `python WORDS…` to its end; returns the finished process with its output as text."""
    with tempfile.TemporaryDirectory() as output:
        process = start(*words, env=env, output=output)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"not done after {timeout} s: {Path(output, 'stderr').read_text()}")
        texts = [Path(output, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def begin(count, folder, script, *words, **environment):
    """Start `script` in `count` processes on CPU, as a launcher starts them; their stderr goes to a file in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alone = count == 1 and "ACCELERATE_USE_DEEPSPEED" not in environment
    processes = []
    for rank in range(count):
        own = {} if alone else {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        env = {**os.environ, **{name: str(value) for name, value in {**shared, **own, **environment}.items()}}
        processes.append(start(script, *words, env=env, output=str(folder)))
    return processes


def launch(count, folder, script, *words, **environment):
    """`begin`, and wait for the end; returns the exit codes and what is in `folder`'s stderr."""
    processes = begin(count, folder, script, *words, **environment)
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes], (folder / "stderr").read_text()


def _become(words, env, output):
    """Turn this process into `python WORDS…`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.path.join(output, name) if output else os.devnull
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent.resolve())
    without_compiled_exchange()
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own end leaves them out


def without_compiled_exchange():
    """Keep DeepSpeed on a CPU from compiling for minutes what exchanges tensors between processes; Gloo does that as well."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def succeed(*words):
    """Run a program that must succeed."""
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    return done


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
