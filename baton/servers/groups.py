"""A torch process group between a trainer, rank 0, and the workers of one server, which torch's own default group knows nothing
of: both sides join it here. Gloo carries it on a CPU, NCCL on CUDA.
"""

import socket
from datetime import timedelta

import torch
import torch.distributed as dist

Group = dist.Backend


def listen(host: str, seconds: float) -> tuple[dist.TCPStore, int]:
    """The store in which the members of groups meet, and its port: it listens on the address `host` alone.

    torch's store listens on every address of the machine unless it is given a socket.
    """
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        port = server.getsockname()[1]
        store = dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=server.detach(),  # the store closes it
        )
    return store, port


def join(store: dist.Store, name: str, rank: int, size: int, device: torch.device, here: str, seconds: float) -> Group:
    """Member `rank` of the group `name` of `size` members; returns once all have joined and one number has arrived at all.

    device: of the tensors that will be sent: Gloo on a CPU, NCCL on CUDA. here: the address of this machine by which the
    others reach it. Raises RuntimeError if not all are there after `seconds`.
    """
    store = dist.PrefixStore(name, store)
    if device.type == "cpu":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=here)]
        options._timeout = timedelta(seconds=seconds)
        group = dist.ProcessGroupGloo(store, rank, size, options)
    else:
        options = dist.ProcessGroupNCCL.Options()
        # Torch ends the whole process at this timeout; those who use the group give up long before.
        options._timeout = timedelta(seconds=10 * seconds + 600)
        group = dist.ProcessGroupNCCL(store, rank, size, options)
    broadcast(group, torch.zeros(1, device=device)).wait(timedelta(seconds=seconds))  # NCCL connects with its first use
    return group


def broadcast(group: Group, tensor: torch.Tensor) -> dist.Work:
    """Begin to copy the trainer's `tensor` into those of the others, in place; it must be contiguous."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([tensor], options)


def own_address(host: str, port: int) -> str:
    """The address of this machine from which it reaches `host`."""
    family = socket.getaddrinfo(host, port)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return probe.getsockname()[0]
