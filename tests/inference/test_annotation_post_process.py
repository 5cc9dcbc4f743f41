"""Post-processing of annotated files: pairs, demonstrations, reward levels; nothing vanishes uncounted."""

import itertools
import json
import statistics
from pathlib import Path

import pytest

from tests.inference.annotation_task import read, run, write

PROGRAM = "post_process.py"


def annotated(count=10, K=4):
    """Records whose rewards all differ, best response first in every third one."""
    return [
        {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": f"Question {i}"}],
            "responses": [f"answer {k} " + "x" * (k * i % 5) for k in range(K)],
            "finish_reasons": ["length" if k == i % K else "stop" for k in range(K)],
            "rewards": [((i * 7 + k * 3) % 11) / 10 + k / 100 for k in range(K)],
            "rewards_by": {"a": [float(k) for k in range(K)]},
            "source": "test",
        }
        for i in range(count)
    ]


@pytest.fixture
def files(tmp_path):
    return {"dataset_name_or_path": write(tmp_path / "in.jsonl", annotated()), "output_dir": tmp_path / "out.jsonl"}


def counts(files):
    return json.loads(Path(f"{files['output_dir']}.manifest.json").read_text())["counts"]


def test_pairs_are_best_against_worst(files):
    run(PROGRAM, **files)
    for record, pair in zip(annotated(), read(files["output_dir"]), strict=True):
        assert pair["chosen"] == record["responses"][record["rewards"].index(max(record["rewards"]))]
        assert pair["rejected"] == record["responses"][record["rewards"].index(min(record["rewards"]))]
        assert pair["source"] == "test"
        assert not pair.keys() & {"responses", "rewards", "rewards_by"}


def test_a_length_penalty_and_a_normalisation_act_on_the_margin(files):
    run(PROGRAM, len_penalty=0.2, normalise="prompt", **files)
    for record, pair in zip(annotated(), read(files["output_dir"]), strict=True):
        rewards = [r - 0.2 * len(t) for r, t in zip(record["rewards"], record["responses"], strict=True)]
        spread = statistics.pstdev(rewards)
        assert pair["margin"] == pytest.approx((max(rewards) - min(rewards)) / spread)


def test_the_best_response_is_a_demonstration(files):
    run(PROGRAM, post_processor="rs", drop_truncated="true", min_reward=0.9, **files)
    made = {record["id"]: record for record in read(files["output_dir"])}
    for record in annotated():
        whole = [i for i, reason in enumerate(record["finish_reasons"]) if reason == "stop"]
        best = max(whole, key=lambda i: record["rewards"][i])
        if record["rewards"][best] >= 0.9:
            messages = [*record["prompt"], {"role": "assistant", "content": record["responses"][best]}]
            assert made[record["id"]]["messages"] == messages
        else:
            assert record["id"] not in made
    assert counts(files)["in"] == 10 == len(made) + sum(counts(files)["dropped"].values())


def test_every_response_is_a_demonstration_at_its_reward_level(files):
    run(PROGRAM, post_processor="ca", bins=4, normalise="file", **files)
    made = read(files["output_dir"])
    assert len(made) == 40
    for record in made:
        assert record["messages"][0]["content"] == f"<reward_{record['reward_level']}> Question {record['id'][1:]}"
    by_level = [[r["reward"] for r in made if r["reward_level"] == level] for level in (1, 2, 3, 4)]
    assert all(8 <= len(rewards) <= 12 for rewards in by_level)
    assert all(max(low) < min(high) for low, high in itertools.pairwise(by_level))
    assert statistics.fmean(r["reward"] for r in made) == pytest.approx(0, abs=1e-9)
    assert statistics.pstdev(r["reward"] for r in made) == pytest.approx(1)


def test_the_texts_of_the_levels_are_the_users(files):
    run(PROGRAM, post_processor="ca", levels=["poor", "very good"], **files)
    made = read(files["output_dir"])
    texts = {1: "poor", 2: "very good"}
    assert {record["reward_level"] for record in made} == set(texts)
    for record in made:
        assert record["messages"][0]["content"] == f"{texts[record['reward_level']]} Question {record['id'][1:]}"
    for levels in (["poor"], ["poor", "poor"], ["poor", ""]):
        log = run(PROGRAM, code=2, post_processor="ca", levels=levels, **files)
        assert "`levels` needs two different texts or more" in log


def test_filters_leave_out_responses_and_count_the_prompts_that_fall_short(tmp_path):
    records = [
        {"id": "twins", "prompt": "Hello", "responses": ["a", "a", "a"], "rewards": [0.1, 0.2, 0.3]},
        {"id": "low", "prompt": "Hello", "responses": ["a", "b", "c"], "rewards": [-5, -6, 0.3]},
        {"id": "good", "prompt": "Hello", "responses": ["a", "b", "c"], "rewards": [0.1, 0.2, 9]},
    ]
    files = {"dataset_name_or_path": write(tmp_path / "in.jsonl", records), "output_dir": tmp_path / "out.jsonl"}
    log = run(PROGRAM, drop_duplicates="true", reward_range=[-1, 1], **files)
    (pair,) = read(files["output_dir"])
    assert (pair["id"], pair["chosen"], pair["rejected"]) == ("good", "b", "a")
    assert counts(files) == {"in": 3, "out": 1, "dropped": {"too few responses left after the filters": 2}}
    assert "dropped twins" in log
    assert "dropped low" in log


def test_a_duplicate_of_a_response_that_was_left_out_stays(tmp_path):
    record = {"prompt": "Hello", "responses": ["a", "b", "a", "a"], "rewards": [0.3, 0.1, 0.3, 0.4]}
    record["finish_reasons"] = ["length", "stop", "stop", "stop"]
    files = {"dataset_name_or_path": write(tmp_path / "in.jsonl", [record]), "output_dir": tmp_path / "out.jsonl"}
    run(PROGRAM, drop_duplicates="true", drop_truncated="true", **files)
    (pair,) = read(files["output_dir"])
    assert (pair["chosen"], pair["rejected"], pair["chosen_reward"]) == ("a", "b", 0.3)


def test_bad_input_is_refused(tmp_path, files):
    good = annotated(1)[0]
    for record, changes, message in [
        ({**good, "rewards": [1.0]}, {}, "in.jsonl:1: 1 `rewards` for 4 `responses`"),
        ({**good, "rewards": None}, {}, "annotate the file first"),
        ({**annotated(1, K=1)[0]}, {}, "a pair needs at least 2 `responses`"),
        (good, {"post_processor": "dpo"}, "`post_processor`"),
        (good, {"choose_typ": "max_min"}, "did you mean `choose_type`?"),
        (good, {"min_margin": -1}, "`min_margin`"),
        (good, {"min_reward": 0.5}, "`min_reward` acts with post_processor rs and best only: leave it out"),
        (good, {"reward_range": [1, -1]}, "`reward_range`: LOW HIGH, of which the first must not be above the second"),
        ({**good, "prompt": [{"role": "system", "content": "x"}]}, {"post_processor": "ca"}, "no user turn"),
    ]:
        write(tmp_path / "in.jsonl", [record])
        assert message in run(PROGRAM, code=2, **{**files, **changes})
        assert not files["output_dir"].exists()
