"""Locks between processes, on a file: held until released, or until the process that holds it ends, however it ends."""

import atexit
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from baton.errors import InputError

# What a file system without locks answers: Lustre mounted without `flock`, NFS without its lock daemon, some FUSE ones.
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class Lock:
    """An exclusive lock on the file `path`, which is made where it is missing and removed when the lock is released.

    The file says who holds the lock: process id, host and time.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[str] | None = None

    def take(self, wait: bool = False) -> bool:
        """Take the lock; returns whether it is now ours. With `wait`, wait until its holder releases it.

        Raises InputError where the file system has no locks.
        """
        while True:
            file = self.path.open("a")  # what its holder wrote stays
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                file.close()
                if isinstance(error, BlockingIOError | PermissionError):
                    return False
                if error.errno in NO_LOCKS:
                    raise InputError(
                        f"{self.path}: the file system there has no file locks ({error.strerror}), without which two programs "
                        "could write to one output: give an output on another file system, or have this one mounted with locks"
                    ) from None
                raise
            if self._is_of(file):
                self.file = file
                atexit.register(self.release)  # for a program that stops with a message; one that is killed leaves the file
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
                return True
            file.close()  # its holder released it, and so removed the file, after it was opened here

    def holder(self) -> str:
        """Who holds the lock, to stand in a message: « (process 4242 on node7, since 2026-11-25 15:20:00)», or nothing."""
        try:
            known = self.path.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:  # released in this moment
            known = ""
        return f" ({known})" if known else ""

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
