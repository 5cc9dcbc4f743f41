"""The check that a program got as many processes, and GPUs for them, as its launcher was told to start."""

import os
from pathlib import Path
from typing import Any

from baton.errors import InputError
from baton.launch import gpus
from baton.launch.unit import PROCESSES
from baton.program import LOCAL_RANK, world_size

FLAGS = ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node")


def check_processes(on_cpu: Any = False) -> None:
    """Raise InputError if the launcher started fewer processes than it was told to, or more than there are GPUs.

    `accelerate launch --cpu --num_processes 2`, for one, silently starts a single process.

    Args:
        on_cpu: whether the program was told to use no GPU: a flag's text, or a value of a YAML file.
    """
    told = int(os.environ.get(PROCESSES, "0")) or _told_on_command_line()
    if told > world_size():
        raise InputError(
            f"the launcher was told to start {told} processes but started {world_size()}. On CPU, use "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {told}` or torchrun"
        )
    if LOCAL_RANK in os.environ and not (_is_true(on_cpu) or _cpu_is_chosen()):
        _check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", world_size())), len(gpus.visible()))


def _check_gpus(processes: int, found: int) -> None:
    """Raise InputError for more `processes` on this machine than GPUs were `found`; torchrun without any stands for the CPU."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ  # which it always sets
    if processes <= found or not (found or by_accelerate):
        return
    advice = f"start {found}, or make more GPUs visible (CUDA_VISIBLE_DEVICES)" if found else "there is no GPU to use"
    raise InputError(
        f"`num_processes`: {processes} processes on this machine, but {found} GPUs, and each process needs its own: {advice}; "
        "on CPU, set ACCELERATE_USE_CPU=true"
    )


def _cpu_is_chosen() -> bool:
    """Whether the variables with which a launcher or a user chooses the CPU say so."""
    return _is_true(os.environ.get("ACCELERATE_USE_CPU")) or "cpu" in (
        os.environ.get("ACCELERATE_TORCH_DEVICE"),
        os.environ.get("DS_ACCELERATOR"),
    )


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes", "y", "on", "t")


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
