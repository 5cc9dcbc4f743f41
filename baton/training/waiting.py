"""Work that process 0 does for all, while the others wait as long as it takes."""

import time
from collections.abc import Callable
from itertools import count

import torch

from baton import program

POLL_SECONDS = 0.2

NUMBERS = count()  # numbers the calls in this process; every process makes them in one order


def in_process_0(work: Callable[[], None]) -> None:
    """Call `work` in process 0, which raises what it raises; every process returns when it is done.

    The others ask for a key of the process group's store. A collective would end them after `ddp_timeout`.
    """
    key = f"baton/done/{next(NUMBERS)}"
    store = torch.distributed.distributed_c10d._get_default_store() if program.world_size() > 1 else None
    if program.rank() == 0:
        work()
        if store:
            store.set(key, "done")
    else:
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
