"""The check that a program got as many processes as its launcher was told to start."""

import os
from pathlib import Path

from baton.errors import InputError
from baton.launch.unit import PROCESSES
from baton.program import world_size

FLAGS = ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node")


def check_processes() -> None:
    """Raise InputError if the launcher was told to start more processes than it did.

    `accelerate launch --cpu --num_processes 2`, for one, silently starts a single process.
    """
    told = int(os.environ.get(PROCESSES, "0")) or _told_on_command_line()
    if told > world_size():
        raise InputError(
            f"the launcher was told to start {told} processes but started {world_size()}. On CPU, use "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {told}` or torchrun"
        )


def _told_on_command_line() -> int:
    """The number of processes on the command line of the parent, a bare `accelerate launch` or torchrun; 0 if there is none."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no parent: the first process of a container
        return 0
    told = 0
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag in FLAGS:
            number = value or following
            told = int(number) if number.isdigit() else 0
    return told
