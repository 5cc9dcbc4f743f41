"""Locks between processes, on a file: held until released, or until the process that holds it ends, however it ends."""

import atexit
import fcntl
import os
from pathlib import Path
from typing import IO


class Lock:
    """An exclusive lock on the file `path`, which is made where it is missing and removed when the lock is released."""

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[str] | None = None

    def take(self, wait: bool = False) -> bool:
        """Take the lock; returns whether it is now ours. With `wait`, wait until its holder releases it."""
        while True:
            file = self.path.open("w")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError):
                file.close()
                return False
            if self._is_of(file):
                self.file = file
                atexit.register(self.release)  # for a program that stops with a message; one that is killed leaves the file
                return True
            file.close()  # its holder released it, and so removed the file, after it was opened here

    def release(self) -> None:
        """Give the lock up, if it is held."""
        if self.file is not None:
            atexit.unregister(self.release)
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def __enter__(self) -> "Lock":
        self.take(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_of(self, file: IO[str]) -> bool:
        """Whether an open file still is the one at `path`."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False
