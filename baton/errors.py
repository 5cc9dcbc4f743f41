"""The errors that a stage ends with, each with its exit code."""

from pathlib import Path

DATA_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")  # of files of data


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


def without_ending(path: str | Path) -> str | None:
    """The file of data that `path` names but for its ending, or None."""
    names = (f"{path}{ending}" for ending in DATA_ENDINGS)
    return next((name for name in names if Path(name).is_file()), None)


def looked_in(path: str | Path) -> str:
    """What to say of a path with nothing there, as the end of a message: what may be meant, or where it was looked for."""
    if near := without_ending(path):
        return f"; did you mean {near}?"
    if str(path).startswith("~"):
        return "; only a shell replaces ~, and not between quotes: give the full path"
    return "" if Path(path).is_absolute() else f"; relative paths start at {Path.cwd()}"
