"""Where programs run: `run` units of work, or chains of them in a process each, to their end; `start` services.

The variable LAUNCHER says what runs them; `local`, the default, is this machine. A launcher is a module with these two
functions. Standard library and baton/*.py only, since it also runs on login nodes.
"""

import os
from collections.abc import Sequence
from types import ModuleType

from baton.errors import InputError
from baton.launch import local
from baton.launch.processes import Process
from baton.launch.unit import Unit

__all__ = ["Process", "Unit", "check_launcher", "run", "run_chains", "run_in_turn", "start"]

LAUNCHERS = {"local": local}


def run(units: Sequence[Unit]) -> None:
    """Run units, all of which need the same number of GPUs, to their end: see local.py for what every launcher promises.

    Raises InputError for units that cannot run, UnitFailed, with the exit code of the first, when units have failed.
    """
    run_chains([[unit] for unit in units])


def run_chains(chains: Sequence[Sequence[Unit]]) -> None:
    """Run chains of units, each chain in one process, one unit after another: see chain.py. All need as many GPUs.

    Raises what `run` raises.
    """
    check_launcher().run(chains)


def run_in_turn(chains: Sequence[Sequence[Unit]]) -> None:
    """Run chains of units one after another; while one runs, the next one's process imports its libraries.

    Raises what `run` raises.
    """
    check_launcher().run_in_turn(chains)


def start(service: Unit, slot: int = 0) -> Process:
    """Start a service that outlives this process; on this machine it takes the `slot`-th group of GPUs of its size."""
    return check_launcher().start(service, slot)


def check_launcher() -> ModuleType:
    """The launcher that LAUNCHER names. Raises InputError if there is no such launcher."""
    name = os.environ.get("LAUNCHER") or "local"
    if name not in LAUNCHERS:
        raise InputError(f"LAUNCHER={name}: not available; set it to {' or '.join(LAUNCHERS)}, or unset it")
    return LAUNCHERS[name]
