"""What a program promises of the processes that it belongs to: one message, its rank, a port of its own, a GPU for each."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from baton.errors import InputError
from baton.launch.check import check_processes
from tests.environments import made_for

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/ddp.yaml", "--num_processes", "2"]
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def program(folder: Path, text: str) -> str:
    """A program of these lines; returns its path."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


FAILS = """
    import signal, sys
    from baton import program
    from baton.errors import InputError
    def main():
        if sys.argv[1] == "second" and program.rank() == 0:
            signal.pause()
        raise ValueError("a bug") if sys.argv[1] == "bug" else InputError("prompts.jsonl:3: no such word")
    program.run(main)
"""


@pytest.mark.parametrize(
    ("which", "message"),
    [("all", "prompts.jsonl:3: no such word"), ("second", "prompts.jsonl:3: no such word"), ("bug", "\nValueError: a bug")],
)
def test_of_processes_that_fail_one_says_why_and_says_it_last(tmp_path, which, message):
    words = [*LAUNCH, program(tmp_path, FAILS), which]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert output.count(message) == 1 and output.rstrip("=\n").endswith(message), output
    assert "interrupted" not in output
    assert output.count("Traceback") == (2 if which == "bug" else 1)  # one is the launcher's own


KILLED = """
    import os, pathlib, signal, sys, time
    from baton import program
    from baton.launch.processes import identify
    def main():
        pids = pathlib.Path(sys.argv[1])
        if program.rank() == 1:
            pids.write_text(f"{os.getpid()} ")
            os.kill(os.getpid(), signal.SIGKILL)
        while not pids.exists() or not pids.read_text().endswith(" ") or identify(int(pids.read_text())):
            time.sleep(0.01)
        raise ConnectionError("closed by peer")
    program.run(main)
"""


def test_where_one_process_was_killed_that_is_said_and_not_what_follows_from_it(tmp_path):
    words = [*LAUNCH, program(tmp_path, KILLED), tmp_path / "pids"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | ON_CPU, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.rstrip("=\n").splitlines()[-1].strip().startswith("traceback : Signal 9 (SIGKILL)"), done.stderr
    assert "closed by peer" not in done.stderr


WAITS = """
    import os, signal
    from baton import program
    def main():
        print(os.getpid(), flush=True)
        signal.pause()
    program.run(main)
"""


def test_kill_9_of_a_bare_launcher_ends_its_processes(tmp_path):
    words = [*LAUNCH, program(tmp_path, WAITS)]
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | ON_CPU, stdout=subprocess.PIPE, text=True) as launcher:
        started = [psutil.Process(int(launcher.stdout.readline())) for _ in range(2)]
        launcher.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


def test_a_pods_rank_does_not_turn_a_plain_program_into_another_process(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    words = ["tests/contract/small_stage.py", "--dataset_name_or_path", prompts, "--output_dir", tmp_path / "out.jsonl"]
    platform = {"RANK": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | platform, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "2 in, 2 out" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.glob("out.jsonl*")] == ["out.jsonl", "out.jsonl.manifest.json"]


MEETS = """
    import os, sys
    import torch
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(int(os.environ["RANK"]) + 1)
    torch.distributed.all_reduce(total)
    if os.environ["RANK"] == "0":
        print(int(total), os.environ["MASTER_PORT"], flush=True)
        sys.stdin.read() if sys.argv[1:] else None
    torch.distributed.barrier()
"""


def test_two_runs_of_two_processes_share_a_machine(tmp_path):
    """One of a bare `accelerate launch`, and one that the launcher starts while the first still runs."""
    path, environment = program(tmp_path, MEETS), os.environ | ON_CPU | {"BATON_ENVS": str(Path(sys.prefix).parent)}
    options = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE}
    launcher = [sys.executable, "-m", "baton.launch", "run", "--name", "unit", "--environment", "training"]
    with subprocess.Popen([*LAUNCH, path, "wait"], stdin=subprocess.PIPE, **options) as first:
        met, port = first.stdout.readline().split()
        second = subprocess.run([*launcher, "--processes", "2", path], timeout=120, check=True, **options)
        assert first.poll() is None
        first.communicate(timeout=120)
    assert first.returncode == 0
    met_too, other_port = second.stdout.split()
    assert met == met_too == "3"
    assert len({port, other_port, "29500"}) == 3  # that one is anyone's


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes this a machine of so many GPUs and starts this process as the first of so many."""

    def make(found: int, processes: int, **variables: str) -> None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text("#!/bin/sh\n" + "".join(f"echo {index}\n" for index in range(found)))
        smi.chmod(0o755)
        monkeypatch.setenv("BATON_ENVS", str(made_for("cuda", tmp_path / "envs")))
        for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "BATON_PROCESSES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        own = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for name, value in (own | variables).items():
            monkeypatch.setenv(name, value)

    return make


BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.mark.parametrize(
    ("found", "processes", "variables"),
    [(1, 2, {}), (8, 2, {"CUDA_VISIBLE_DEVICES": "3"}), (0, 2, BY_ACCELERATE), (0, 1, BY_ACCELERATE)],
)
def test_more_processes_than_gpus_are_refused_with_both_numbers(machine, found, processes, variables):
    machine(found, processes, **variables)
    seen = 1 if "CUDA_VISIBLE_DEVICES" in variables else found
    with pytest.raises(InputError, match=f"`num_processes`: {processes} processes on this machine, but {seen} GPUs"):
        check_processes()


@pytest.mark.parametrize(
    ("found", "processes", "variables", "on_cpu"),
    [
        (2, 2, BY_ACCELERATE, None),
        (2, 16, {"LOCAL_WORLD_SIZE": "2"}, None),  # on eight machines
        (0, 2, {}, None),  # torchrun on a machine without a GPU
        (1, 2, BY_ACCELERATE, "true"),
        (1, 2, BY_ACCELERATE | {"ACCELERATE_USE_CPU": "true"}, None),
        (1, 2, {"ACCELERATE_TORCH_DEVICE": "cpu"}, False),
    ],
)
def test_as_many_processes_as_gpus_or_any_number_on_a_cpu_are_accepted(machine, found, processes, variables, on_cpu):
    machine(found, processes, **variables)
    check_processes(on_cpu)
