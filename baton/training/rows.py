"""Training rows on disk: written once, mapped into memory by every process."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from baton import program
from baton.errors import InputError


def rows_on_disk(rows: Callable[[], Iterator[dict[str, Any]]], config: Any, name: str) -> datasets.Dataset:
    """Training rows as a memory-mapped dataset: process 0 writes them once, every process maps the same file.

    `rows` must yield at least one. An InputError that it raises is raised here as it is.
    """
    folder = Path(config.output_dir, "rows", name)
    with config.main_process_first(local=False):
        if program.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                written = datasets.Dataset.from_generator(rows, cache_dir=str(folder / "cache"), fingerprint=name)
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ if isinstance(error.__cause__, InputError) else error from None
            written.save_to_disk(folder / "rows")
    return datasets.load_from_disk(str(folder / "rows"))
