"""Real text end to end: real prompts with 8 real responses each, of one word to 1,561, annotated, paired and trained on."""

import gzip
import json

import pytest

from baton.program import cpu_has_bfloat16
from tests.programs import ROOT, read_jsonl, succeed, write_jsonl

SOURCE = ROOT.parent / "shared/data/alpaca_eval_k8.jsonl.gz"
LABELLED = 120  # prompts whose own rewards the reward model learns from
BF16, DTYPE = ("true", "bfloat16") if cpu_has_bfloat16() else ("false", "float32")
ANNOTATED = 40  # the last prompts, whose responses it scores

pytestmark = [
    pytest.mark.skipif(not SOURCE.exists(), reason=f"the real data is not at {SOURCE}"),
    pytest.mark.timeout(1200),
]


def best_and_worst(record):
    ranked = sorted(zip(record["rewards"], record["responses"], strict=True))
    return {"prompt": record["prompt"], "chosen": ranked[-1][1], "rejected": ranked[0][1]}


def test_real_responses_are_annotated_paired_and_trained_on(tmp_path):
    with gzip.open(SOURCE, "rt") as file:
        records = [json.loads(line) for line in file]
    text = [{"prompt": r["prompt"], "response": r["responses"][-1]} for r in records]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", map(best_and_worst, records[:LABELLED]))
    shape = ["--vocabulary", 4096, "--hidden_size", 64, "--layers", 2, "--head_size", 32, "--positions", 4096]
    base = tmp_path / "base"
    succeed("quickstart/make_model.py", "--text", write_jsonl(tmp_path / "text.jsonl", text), "--output_dir", base, *shape)
    on_cpu = ["--use_cpu", "true", "--bf16", BF16, "--gradient_checkpointing", "false", "--per_device_train_batch_size", 4]
    succeed(
        "reward_model/run_rm.py", "--model_name_or_path", base, "--dataset_name_or_path", pairs, "--max_length", 1024,
        "--output_dir", tmp_path / "reward_model", "--max_steps", 16, "--learning_rate", 1e-3, *on_cpu,
    )  # fmt: skip
    records = records[-ANNOTATED:]
    unlabelled = [{key: value for key, value in record.items() if key != "rewards"} for record in records]
    annotated = tmp_path / "annotated.jsonl"
    succeed(
        "annotate_data/get_rewards.py", "--dataset_name_or_path", write_jsonl(tmp_path / "responses.jsonl", unlabelled),
        "--reward_name_or_path", tmp_path / "reward_model", "--output_dir", annotated, "--K", 8, "--dtype", DTYPE,
        "--max_length", 256,
    )  # fmt: skip
    got = read_jsonl(annotated)
    assert [record["responses"] for record in got] == [record["responses"] for record in records]
    assert all(len(record["rewards"]) == 8 and record["models"] for record in got)

    policy = tmp_path / "policy"
    succeed(
        "dpo_iteration/run_dpo.py", "--model_name_or_path", base, "--dataset_name_or_path", annotated, "--output_dir", policy,
        "--max_length", 1024, "--max_prompt_length", 512, "--max_steps", 8, "--learning_rate", 1e-4, *on_cpu,
    )  # fmt: skip
    counts = json.loads((tmp_path / "policy.manifest.json").read_text())["counts"]
    assert counts["in"] == len(records) == counts["out"] + sum(counts["dropped"].values())
    assert (policy / "model.safetensors").exists()
