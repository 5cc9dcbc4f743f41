"""Processes of this machine by pid and start time: after a process has ended, its pid may belong to another one."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

POLL_SECONDS = 0.05


class Process(NamedTuple):
    """A process: its `pid`, and when it `started`, in clock ticks since the machine did."""

    pid: int
    started: int


def identify(pid: int) -> Process | None:
    """The process that has this pid now; None if it has ended, even where its parent has not collected it yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold spaces
    except OSError:
        return None
    return None if fields[0] == "Z" else Process(pid, int(fields[19]))


def is_alive(process: Process) -> bool:
    """Whether this very process still runs."""
    return identify(process.pid) == process


def end(leaders: Iterable[Process], seconds: float = 20.0) -> None:
    """End the process groups of `leaders`: by TERM, and by KILL what is still there after `seconds`.

    TERM goes to the leader alone, which ends its own children; to the whole group where the leader is dead.
    """
    # Without a process of this pid, or with the same one as ever, a group of this number can only be the leader's.
    groups = [leader for leader in leaders if identify(leader.pid) in (None, leader)]
    for leader in groups:
        if is_alive(leader):
            os.kill(leader.pid, signal.SIGTERM)
        else:
            _signal_group(leader.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    try:
        while (groups := [leader for leader in groups if _group_exists(leader.pid)]) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:  # even when this wait is interrupted, none stays
        for leader in groups:
            _signal_group(leader.pid, signal.SIGKILL)


def _group_exists(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child of this process that has ended counts as existing until it is collected
    return _signal_group(pid, 0)


def _signal_group(pid: int, number: int) -> bool:
    """Send a signal to a process group; False if there is none."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
