"""Run in one or several processes by test_layouts.py: a training program as it is, whose losses are noted unrounded.

    layout_processes.py FILE PROGRAM [ARGUMENT …]

Process 0 writes one JSON number for each logged step to FILE.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from transformers import Trainer

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton import program


def note_losses(file: Path) -> None:
    log = Trainer.log

    def noted(trainer, logs, *rest):
        if "loss" in logs and program.rank() == 0:
            with file.open("a") as lines:
                lines.write(json.dumps(logs["loss"]) + "\n")
        return log(trainer, logs, *rest)

    Trainer.log = noted


def main() -> None:
    file, sys.argv = Path(sys.argv[1]), sys.argv[2:]
    note_losses(file)
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
