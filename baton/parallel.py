"""Which share of the data this process computes: the one place that knows how processes relate to data-parallel ranks.

Processes of one tensor, context or sequence parallel group hold parts of one model and compute the same data together, so they
have one data-parallel rank. Their sizes are those of Accelerate's parallelism configuration, as its launcher sets them.
"""

import os
from typing import NamedTuple

from baton import program

# Accelerate's environment variables for the dimensions of one model; the product is the size of a group.
MODEL_PARALLEL_SIZES = ("PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_SP_SIZE")


class DataParallel(NamedTuple):
    """This process's share of the data is `rank` (from 0) of `size`."""

    rank: int
    size: int


def model_parallel_size() -> int:
    """How many processes hold one copy of the model together; 1 where each has its own, or a shard of its data's."""
    size = 1
    for name in MODEL_PARALLEL_SIZES:
        size *= int(os.environ.get(name, "1"))
    return size


def data_parallel() -> DataParallel:
    """This process's data-parallel rank and size. Neighbouring ranks form one model-parallel group, as in Accelerate's mesh."""
    group = model_parallel_size()
    return DataParallel(program.rank() // group, program.world_size() // group)
