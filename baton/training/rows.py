"""Training rows on disk: written once, mapped into memory by every process."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from baton.training.waiting import in_process_0


def rows_on_disk(
    rows: Callable[[], Iterator[dict[str, Any]]], config: Any, name: str, features: datasets.Features | None = None
) -> datasets.Dataset:
    """Training rows as a memory-mapped dataset: process 0 writes them once, every process maps the same file.

    The others wait as long as it takes. `rows` must yield at least one. What it raises, an interrupt among it, is raised here
    as it is. `features` are the columns' types, where the first rows may not show them.
    """
    folder = Path(config.output_dir, "rows", name)
    in_process_0(partial(_write, rows, folder, name, features))
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
