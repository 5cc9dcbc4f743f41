"""The folders of a run's rounds."""

import re
from pathlib import Path


def rounds_in(folder: Path) -> dict[int, Path]:
    """The folders round0, round1, … in `folder`, by number, ascending."""
    found = {int(match[1]): path for path in folder.glob("round*") if (match := re.fullmatch(r"round(\d+)", path.name))}
    return dict(sorted(found.items()))
