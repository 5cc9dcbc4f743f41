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
from baton.launch.unit import DONE, GO, READY, Unit

log = logging.getLogger("baton")

CHILD = Path(__file__).with_name("child.py")


@dataclass
class Running:
    """A chain of units that was started as one process."""

    units: Sequence[Unit]
    slot: list[str]  # its GPUs
    process: subprocess.Popen[bytes]
    folder: Path  # where the program leaves its exit code and message; for a chain see chain.py
    log_starts: list[int]  # the size of each unit's log before, in bytes
    began: float  # when the unit started that runs now
    done: int = 0  # how many units have ended

    @property
    def unit(self) -> Unit:
        """The unit that runs."""
        return self.units[min(self.done, len(self.units) - 1)]


def run(chains: Sequence[Sequence[Unit]]) -> None:
    """Run chains of units, all of which need the same number of GPUs, to their end.

    As many run at once as there are slots: groups of GPUs, or the CPU as one. A free slot takes the next chain. After a failure
    such as a wrong flag, which would fail every unit alike, no further one is started, and those that run are waited for. All
    end when this process is interrupted or dies. To be called from the main thread: Linux ends them with the thread that
    started them.

    Raises InputError for more GPUs than there are or a missing environment, UnitFailed when units have failed.
    """
    waiting, free = deque(chains), slots([unit for chain in chains for unit in chain])
    running: list[Running] = []
    failures: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory(prefix="baton-") as name:
        try:
            while running or (waiting and not failures):
                while waiting and free and not failures:
                    folder = Path(name, str(len(waiting)))
                    folder.mkdir()
                    chain, slot = waiting.popleft(), free.pop(0)
                    work = chain[0] if len(chain) == 1 else unit.chained(chain, folder)
                    _say_start(work, slot)
                    (folder / GO).touch()
                    running.append(_start(work, chain, slot, folder))
                ended = [entry for entry in running if entry.process.poll() is not None]
                for entry in running:
                    _report_done(entry)
                for entry in ended:
                    running.remove(entry)
                    free.append(entry.slot)
                    failures += _report(entry)
                time.sleep(processes.POLL_SECONDS)
        finally:
            processes.end(filter(None, (processes.identify(entry.process.pid) for entry in running)))
    if failures:
        raise UnitFailed("\n".join(message for message, _ in failures), failures[0][1])


def run_in_turn(chains: Sequence[Sequence[Unit]]) -> None:
    """Run chains of units one after another. While one runs, the next one's process imports its libraries, and then waits.

    As `run` in everything else.
    """
    started: list[Running] = []
    with tempfile.TemporaryDirectory(prefix="baton-") as name:

        def begin(chain: Sequence[Unit]) -> Running:
            folder = Path(tempfile.mkdtemp(dir=name))
            return _start(unit.chained(chain, folder), chain, slots(chain)[0], folder)

        try:
            for index in range(len(chains)):
                if index == len(started):
                    started.append(begin(chains[index]))
                elif started[index].process.poll() is not None:  # it died while it waited, for the machine's memory, say
                    started[index] = begin(chains[index])
                entry = started[index]
                entry.began = time.monotonic()
                _say_start(entry.unit, entry.slot)
                (entry.folder / GO).touch()
                while entry.process.poll() is None:
                    _report_done(entry)
                    if len(started) < len(chains) and (started[-1] is entry or (started[-1].folder / READY).exists()):
                        started.append(begin(chains[len(started)]))
                    time.sleep(processes.POLL_SECONDS)
                _report_done(entry)
                for message, code in _report(entry):
                    raise UnitFailed(message, code)
        finally:
            alive = [entry.process.pid for entry in started if entry.process.poll() is None]
            processes.end(filter(None, map(processes.identify, alive)))


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


def _start(work: Unit, chain: Sequence[Unit], slot: list[str], folder: Path) -> Running:
    """Start `work`, which runs the units of `chain`."""
    command = [sys.executable, "-I", "-S", str(CHILD), str(os.getpid()), *unit.command_line(work)]
    variables = unit.variables(work) | _devices(slot) | {program.PARENT: str(os.getpid())}
    if unit.uses_accelerate(work):
        variables[program.FAILURE] = str(folder / "failure")
    log_starts = [each.log.stat().st_size if each.log and each.log.exists() else 0 for each in chain]
    with _output(work, "ab") as output:
        # A session of its own: what a terminal sends to all, such as an interrupt, comes from this process alone.
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    return Running(chain, slot, process, folder, log_starts, time.monotonic())


def _say_start(work: Unit, slot: list[str]) -> None:
    place = f" on GPU {','.join(slot)}" if slot else ""
    log.info("%s starts%s%s", work.name, place, f"; log: {work.log}" if work.log else "")


def _output(work: Unit, mode: str) -> contextlib.AbstractContextManager[IO[bytes] | None]:
    """The unit's log, opened; a context of None without one: the output of this process."""
    if work.log is None:
        return contextlib.nullcontext()
    work.log.parent.mkdir(parents=True, exist_ok=True)
    return work.log.open(mode)


def _devices(slot: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(slot)} if slot else {}


def _report_done(entry: Running) -> None:
    """Say which units of a chain have ended since this was called last, and that the next one has started."""
    done = entry.folder / DONE
    codes = done.read_text(encoding="ascii").splitlines() if done.exists() else []
    for code in codes[entry.done :]:
        _say_end(entry)
        if code != "0":
            log.info("%s: goes on without the records that were dropped", entry.unit.name)
        entry.done, entry.began = entry.done + 1, time.monotonic()
        if entry.done < len(entry.units):
            _say_start(entry.unit, entry.slot)


def _say_end(entry: Running) -> None:
    """Say that a unit has succeeded; one without a log has just said its last line itself."""
    if entry.unit.log is not None:
        tail = _end_of_log(entry)
        last = tail[-1].split(" INFO ", 1)[-1] if tail else ""
        log.info("%s: %.0f s%s", entry.unit.name, time.monotonic() - entry.began, f", {last}" if last else "")


def _end_of_log(entry: Running) -> list[str]:
    """The last lines that the unit that runs has written to its log."""
    return unit.end_of_log(entry.unit.log, entry.log_starts[min(entry.done, len(entry.units) - 1)]) if entry.unit.log else []


def _report(ended: Running) -> list[tuple[str, int]]:
    """Say how a process ended; the message and the exit code of the unit that failed in it, if one did."""
    code, failure = ended.process.returncode, ended.folder / "failure"
    if code == 0:
        if not ended.done:  # no chain
            _say_end(ended)
        return []
    code = 128 - code if code < 0 else code  # ended by a signal: as a shell counts
    tail = _end_of_log(ended)
    if failure.exists():
        number, _, message = failure.read_text(encoding="utf-8").partition("\n")
        code, tail = int(number or code), message.splitlines() or tail
    where = f"; the end of {ended.unit.log}:" if ended.unit.log else ""
    return [("\n".join([f"{ended.unit.name}: failed with exit code {code}{where}", *tail[-unit.TAIL_LINES :]]), code)]
