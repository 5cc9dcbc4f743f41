"""The errors that a stage ends with, each with its exit code."""

from pathlib import Path


class InputError(Exception):
    """Bad arguments or input: the message names file, line and field, and says what to do. Exit code 2."""

    exit_code = 2


class FailuresListed(Exception):
    """The stage finished what it could; the message lists what failed. Exit code 3."""

    exit_code = 3


class UnitFailed(Exception):
    """Programs that this one started have failed; the message shows the end of their logs. `exit_code` is that of the first."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def looked_in(path: str | Path) -> str:
    """Where a path with nothing there was looked for, as the end of a message; the empty text for a full path."""
    if str(path).startswith("~"):
        return "; only a shell replaces ~, and not between quotes: give the full path"
    return "" if Path(path).is_absolute() else f"; relative paths start at {Path.cwd()}"
