"""Running the project's programs in tests as a user does: as processes, from the project's folder."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_program(*words, **options):
    """Run one of the programs in this environment; returns the finished process with its output as text."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, **options)


def succeed(*words):
    """Run a program that must succeed."""
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    return done


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
