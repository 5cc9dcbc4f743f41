"""Run by the local launcher between its fork and a unit's command: `child.py LAUNCHER_PID COMMAND [ARGUMENT ...]`.

It has Linux kill the process when the launcher dies, `kill -9` included, and becomes the command. A file of its own that
imports nothing of the project, so that it takes as little time as Python does to start.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)

ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):  # it died before
    sys.exit(128 + signal.SIGKILL)
os.execv(sys.argv[2], sys.argv[2:])
