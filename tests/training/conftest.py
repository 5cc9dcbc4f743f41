"""A base model and data of the quickstart's task, small, made once for all tests of the training programs."""

import pytest

from tests.programs import read_jsonl, succeed, write_jsonl


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder with `data/` and `base/`."""
    folder = tmp_path_factory.mktemp("task")
    sizes = ["--demonstrations", 600, "--train_pairs", 200, "--test_pairs", 40]
    prompts = ["--prompts_per_round", 48, "--heldout_prompts", 8]
    succeed("quickstart/make_data.py", "--output_dir", folder / "data", *sizes, *prompts)
    small = ["--hidden_size", 64, "--layers", 2]
    succeed("quickstart/make_model.py", "--text", folder / "data/sft.jsonl", "--output_dir", folder / "base", *small)
    return folder


@pytest.fixture(scope="session")
def annotated(task):
    """Annotated responses of 48 prompts, K = 4, whose reward is one for favourable words; the path of the file."""
    good = ["A warm and lovely film.", "The cast shines.", "A joyful story."]
    bad = ["A dull mess.", "The plot drags.", "A stale bore."]
    records = []
    for number, record in enumerate(read_jsonl(task / "data/prompts_round1.jsonl")):
        responses = [(good + bad)[(number + step) % 6] for step in range(4)]
        rewards = [float(response in good) + number / 1000 + step / 100 for step, response in enumerate(responses)]
        records.append({**record, "responses": responses, "rewards": rewards, "source": "test"})
    return write_jsonl(task / "annotated.jsonl", records)
