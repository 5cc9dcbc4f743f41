"""A worker's function for test_tokenising.py, in a file that imports nothing heavy."""

import os
import signal


def killed(records, drops, counted):
    """Ends the worker as the kernel ends a process for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)
