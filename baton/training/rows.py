"""Training rows on disk: written once, mapped into memory by every process."""

import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import torch

from baton import program

POLL_SECONDS = 0.2

NUMBERS = count()  # numbers the datasets of this process; every process writes or awaits them in one order


def rows_on_disk(
    rows: Callable[[], Iterator[dict[str, Any]]], config: Any, name: str, features: datasets.Features | None = None
) -> datasets.Dataset:
    """Training rows as a memory-mapped dataset: process 0 writes them once, every process maps the same file.

    The others wait as long as it takes: they ask for a key of the process group's store. A collective would end them after
    `ddp_timeout`. `rows` must yield at least one. What it raises, an interrupt among it, is raised here as it is.
    `features` are the columns' types, where the first rows may not show them.
    """
    folder = Path(config.output_dir, "rows", name)
    key = f"baton/rows/{next(NUMBERS)}"
    store = torch.distributed.distributed_c10d._get_default_store() if program.world_size() > 1 else None
    if program.rank() == 0:
        _write(rows, folder, name, features)
        if store:
            store.set(key, name)
    else:
        while not store.check([key]):
            time.sleep(POLL_SECONDS)
    return datasets.load_from_disk(str(folder / "rows"))


def _write(rows: Callable[[], Iterator[dict[str, Any]]], folder: Path, name: str, features: datasets.Features | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    cause = None
    try:
        dataset = datasets.Dataset.from_generator(rows, features, cache_dir=str(folder / "cache"), fingerprint=name)
    except datasets.exceptions.DatasetGenerationError as error:  # which says nothing of its own
        cause = error.__cause__ or error
    if cause is not None:
        raise cause
    dataset.save_to_disk(folder / "rows")
