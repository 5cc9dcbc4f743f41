"""Run by test_resume_layouts.py in one or several processes: a training program that checks its reference's first batch.

    checked_processes.py {right,wrong} PROGRAM [ARGUMENT …]

`wrong`: packed responses see other prompts and responses too.
"""

import os
import runpy
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton.models import attention
from baton.models.trees import Layout
from baton.training import reference


def main() -> None:
    which, sys.argv = sys.argv[1], sys.argv[2:]
    reference.dataset_reference_logps = partial(reference.dataset_reference_logps, check_first_batch=True)
    if which == "wrong":
        by_trees = attention.by_trees
        attention.by_trees = lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:])
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
