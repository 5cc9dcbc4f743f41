"""The processes that a launcher started: the device of each, and the few points at which they wait for each other."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from baton.errors import InputError
from baton.program import world_size

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]

# A process that waits for a dead one ends with an error after this time; the next run goes on where it stopped.
LONGEST_WAIT = timedelta(hours=2)


def choose_device(wanted: Device) -> "torch.device":
    """This process's device. Raises InputError if a GPU is wanted and there is none.

    That each process has a GPU of its own is for baton/launch/check.py to check. On CPU the cores are divided among the
    processes of this machine: launchers tend to give each a single thread.
    """
    import torch

    on_cpu = wanted == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if not on_cpu and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    if wanted == "cuda":
        raise InputError("--device cuda: PyTorch finds no GPU on this machine")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all processes. Raises RuntimeError when one of them is gone."""
    if world_size() == 1:
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    torch.distributed.barrier()


def described(device: "torch.device") -> dict[str, object]:
    """What `log_what_runs` says of the processes and their device."""
    import torch

    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "processes": world_size()}
    return {"device": "cpu", "processes": world_size(), "threads": torch.get_num_threads()}
