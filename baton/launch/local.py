"""The launcher LAUNCHER=local: units are processes of this machine."""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from baton import program
from baton.errors import InputError, UnitFailed
from baton.launch import gpus, processes, unit
from baton.launch.unit import Unit

log = logging.getLogger("baton")

CHILD = Path(__file__).with_name("child.py")


@dataclass
class Running:
    """A unit that was started."""

    unit: Unit
    slot: list[str]  # its GPUs
    process: subprocess.Popen[bytes]
    failure: Path  # where the program leaves its exit code and message
    log_start: int  # the size of its log before, in bytes
    began: float


def run(units: Sequence[Unit]) -> None:
    """Run units, all of which need the same number of GPUs, to their end.

    As many run at once as there are slots: groups of GPUs, or the CPU as one. A free slot takes the next unit. After a failure
    such as a wrong flag, which would fail every unit alike, no further one is started, and those that run are waited for. All
    end when this process is interrupted or dies. To be called from the main thread: Linux ends them with the thread that
    started them.

    Raises InputError for more GPUs than there are or a missing environment, UnitFailed when units have failed.
    """
    waiting, free = deque(units), slots(units)
    running: list[Running] = []
    failures: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory(prefix="baton-") as folder:
        try:
            while running or (waiting and not failures):
                while waiting and free and not failures:
                    running.append(_start(waiting.popleft(), free.pop(0), Path(folder, str(len(waiting)))))
                for ended in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(ended)
                    free.append(ended.slot)
                    failures += _report(ended)
                time.sleep(processes.POLL_SECONDS)
        finally:
            processes.end(filter(None, (processes.identify(entry.process.pid) for entry in running)))
    if failures:
        raise UnitFailed("\n".join(message for message, _ in failures), failures[0][1])


def start(service: Unit, slot: int = 0) -> processes.Process:
    """Start a service that outlives this process, on the `slot`-th group of GPUs if it needs any; its log starts anew.

    Raises InputError for more GPUs than there are or a missing environment.
    """
    devices = slots([service])
    if service.gpus == 0:
        slot = 0  # the machine, for any number of services
    if slot >= len(devices):
        raise InputError(f"{service.name}: {slot + 1} × {service.gpus} GPUs, but there are {len(gpus.visible())}")
    command, variables = unit.command_line(service), unit.variables(service)
    with _output(service, "wb") as output:
        started = subprocess.Popen(
            command,
            env=variables | _devices(devices[slot]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    # If it has ended already, there is nobody to confuse it with: a start time of 0 is no process's.
    return processes.identify(started.pid) or processes.Process(started.pid, 0)


def slots(units: Sequence[Unit]) -> list[list[str]]:
    """The GPUs of each unit that can run at once. Raises InputError if there are too few for one."""
    needed = units[0].gpus if units else 0
    if needed == 0:
        return [[]]
    visible = gpus.visible()
    if needed > len(visible):
        raise InputError(f"{units[0].name}: needs {needed} GPUs, but there are {len(visible)}")
    return gpus.groups(visible, needed)


def _start(work: Unit, slot: list[str], failure: Path) -> Running:
    command = [sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), *unit.command_line(work)]
    variables = unit.variables(work) | _devices(slot) | {program.PARENT: str(os.getpid())}
    if unit.uses_accelerate(work):
        variables[program.FAILURE] = str(failure)
    place = f" on GPU {','.join(slot)}" if slot else ""
    log.info("%s starts%s%s", work.name, place, f"; log: {work.log}" if work.log else "")
    with _output(work, "ab") as output:
        log_start = output.tell() if output else 0
        # A session of its own: what a terminal sends to all, such as an interrupt, comes from this process alone.
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return Running(work, slot, process, failure, log_start, time.monotonic())


def _output(work: Unit, mode: str) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    """The unit's log, opened; a context of None without one: the output of this process."""
    if work.log is None:
        return contextlib.nullcontext()
    work.log.parent.mkdir(parents=True, exist_ok=True)
    return work.log.open(mode)


def _devices(slot: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(slot)} if slot else {}


def _report(ended: Running) -> list[tuple[str, int]]:
    """Say how a unit ended; its message and exit code if it failed."""
    name, code = ended.unit.name, ended.process.returncode
    tail = unit.end_of_log(ended.unit.log, ended.log_start) if ended.unit.log else []
    if code == 0:
        if ended.unit.log is not None:  # else what it says last has just been shown
            last = tail[-1].split(" INFO ", 1)[-1] if tail else ""
            log.info("%s: %.0f s%s", name, time.monotonic() - ended.began, f", {last}" if last else "")
        return []
    code = 128 - code if code < 0 else code  # ended by a signal: as a shell counts
    if ended.failure.exists():
        number, _, message = ended.failure.read_text(encoding="utf-8").partition("\n")
        code, tail = int(number or code), message.splitlines() or tail
    where = f"; the end of {ended.unit.log}:" if ended.unit.log else ""
    return [("\n".join([f"{name}: failed with exit code {code}{where}", *tail[-unit.TAIL_LINES :]]), code)]
