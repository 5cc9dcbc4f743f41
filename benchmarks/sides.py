"""The sides of a benchmark: each runs in a process of its own, so that peak memory is its own; in turns; the median run counts.

A benchmark that imports this runs one side where it is called with `--run_side SIDE --folder FOLDER`, and then prints what was
measured as a JSON object on its last line: `side`, `seconds` and what else it reports.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def add_arguments(parser: argparse.ArgumentParser, sides: Sequence[str]) -> None:
    """The arguments of every such benchmark; `sides` are run where the user names none."""
    parser.add_argument("--sides", nargs="+", default=list(sides), help="what to run, in turn")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in turn; the median counts")
    parser.add_argument("--run_side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run_in_turn(args: argparse.Namespace, folder: Path) -> list[dict]:
    """For each of `args.sides` its run of median seconds; of an even number, the slower of the middle two."""
    runs = [in_process(side, folder) for _ in range(args.repeats) for side in args.sides]
    return [median([run for run in runs if run["side"] == side]) for side in args.sides]


def median(runs: list[dict]) -> dict:
    return sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]


def in_process(side: str, folder: Path, *more: str) -> dict:
    """Run one side by this very command, with `more` arguments."""
    command = [sys.executable, *sys.argv, *more, "--run_side", side, "--folder", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def peak_memory(device: str) -> int:
    """Bytes: of the GPU's allocator, or of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
