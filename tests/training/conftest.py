"""A base model and data of the quickstart's task, small, made once for all tests of the training programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_program(*words, cwd=ROOT, **options):
    """Run one of the project's programs as a user does; returns the finished process with its output as text."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, **options)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder with `data/` and `base/`."""
    folder = tmp_path_factory.mktemp("task")
    sizes = ["--demonstrations", 600, "--train_pairs", 200, "--test_pairs", 40]
    prompts = ["--prompts_per_round", 48, "--heldout_prompts", 8]
    made = run_program("quickstart/make_data.py", "--output_dir", folder / "data", *sizes, *prompts)
    assert made.returncode == 0, made.stderr
    small = ["--hidden_size", 64, "--layers", 2]
    made = run_program("quickstart/make_model.py", "--text", folder / "data/sft.jsonl", "--output_dir", folder / "base", *small)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session")
def annotated(task):
    """Annotated responses of 48 prompts, K = 4, whose reward is one for favourable words; the path of the file."""
    good = ["A warm and lovely film.", "The cast shines.", "A joyful story."]
    bad = ["A dull mess.", "The plot drags.", "A stale bore."]
    path = task / "annotated.jsonl"
    with path.open("w") as file:
        for number, record in enumerate(read_jsonl(task / "data/prompts_round1.jsonl")):
            responses = [(good + bad)[(number + step) % 6] for step in range(4)]
            rewards = [float(response in good) + number / 1000 + step / 100 for step, response in enumerate(responses)]
            file.write(json.dumps({**record, "responses": responses, "rewards": rewards, "source": "test"}) + "\n")
    return path
