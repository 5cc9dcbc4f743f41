"""Log-probabilities that sampling keeps: one a token, of the distribution that was sampled; they change no token."""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import pytest

from baton.manifest import read_manifest
from report.kl import history, obstacle
from tests.inference.tiny_policy import TEMPLATE, make_tiny_policy
from tests.programs import read_jsonl, run_program, succeed, write_jsonl

K, NEW, TEMPERATURE, TOP_K, TOP_P = 3, 24, 0.7, 200, 0.8
PROMPTS = [{"prompt": f"film {n}", "n": n} for n in range(6)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    """A policy whose own settings ask for greedy sampling, which nobody has asked for here."""
    folder = make_tiny_policy(tmp_path_factory.mktemp("policy"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "min_p": 1.0, "no_repeat_ngram_size": 1}))
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)


def generate(policy: Path, prompts: Path, output: Path, *flags: object):
    words = ["generation/get_hf2.py", "--model_name_or_path", policy, "--dataset_name_or_path", prompts, "--output_dir", output]
    # As on a machine without a compiler, and without what an earlier compilation left.
    env = os.environ | {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(output.with_name("compiled"))}
    done = run_program(*words, "--K", K, "--max_new_tokens", NEW, "--dtype", "float32", "--seed", 3, *flags, env=env)
    assert done.returncode == 0, done.stderr
    return read_jsonl(f"{output}0.jsonl")


@pytest.fixture(scope="module", params=["vllm", "hf"])
def sampled(request, policy, prompts, tmp_path_factory):
    """The backend, and the records of the same sampling without and with log-probabilities; stop strings cut some responses."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["--backend", request.param, "--temperature", TEMPERATURE, "--top_k", TOP_K, "--top_p", TOP_P, "--stop", "joy", "a"]
    without = generate(policy, prompts, folder / "without", *flags)
    return without, generate(policy, prompts, folder / "with", *flags, "--response_logps")


def test_the_same_tokens_are_sampled_with_log_probabilities_and_without(sampled):
    without, records = sampled
    assert [{**record, "response_logps": None} for record in records] == [{**r, "response_logps": None} for r in without]
    assert not any("response_logps" in record for record in without)
    assert len({response for record in records for response in record["responses"]}) > len(PROMPTS)
    assert {reason for record in records for reason in record["finish_reasons"]} == {"stop", "length"}


def test_the_log_probabilities_are_those_of_the_distribution_that_was_sampled(sampled, policy):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype="float32").eval()
    for record in sampled[1]:
        prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
        for ids, logps in zip(record["response_token_ids"], record["response_logps"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = [truncated(row)[id_].item() for row, id_ in zip(logits / TEMPERATURE, ids, strict=True)]
            assert logps == pytest.approx(expected, abs=1e-4)
            assert all(logp == float(f"{logp:.6g}") for logp in logps)


def truncated(logits):
    """Log-probabilities (V,) after top-k and top-p, by their definition."""
    import torch

    kept = logits.topk(TOP_K).indices
    ordered = logits[kept].softmax(-1)
    kept = kept[ordered.cumsum(-1) - ordered < TOP_P]
    return torch.full_like(logits, -math.inf).index_put((kept,), logits[kept].log_softmax(-1))


def test_get_logps_scores_the_same_tokens_and_sampling_resumed_and_merged_keeps_what_is_there(policy, prompts, tmp_path):
    flags = ["--backend", "hf", "--response_logps", "--max_new_tokens", 120]
    whole = generate(policy, prompts, tmp_path / "whole", *flags)
    lines = (tmp_path / "whole0.jsonl").read_bytes().splitlines()
    shutil.copy(tmp_path / "whole0.jsonl.manifest.json", tmp_path / "again.partial.manifest.json")
    (tmp_path / "again.partial0-of-1").write_bytes(b"[1,%b]\n[4,%b]\n" % (lines[1], lines[4]))  # killed after two prompts
    generate(policy, prompts, tmp_path / "again", *flags)
    merged = tmp_path / "merged.jsonl"
    succeed("generation/merge_data.py", "--base_path", tmp_path / "again", "--num_datasets", 1, "--output_dir", merged)
    again = read_jsonl(merged)
    assert (again[1], again[4]) == (whole[1], whole[4])
    reasons = set()
    for record, before in zip(score(policy, merged, tmp_path / "scored.jsonl"), again, strict=True):
        assert record["response_logps"] == before["response_logps"]
        assert record["logps_by"]["policy"] == pytest.approx([math.fsum(logps) for logps in record["response_logps"]], abs=2e-3)
        reasons |= set(record["finish_reasons"])
    assert reasons == {"stop", "length"}  # the end token counts where it was sampled
    assert [manifest["stage"] for manifest in history(tmp_path / "scored.jsonl")] == ["logps", "merge", "generate"]
    assert obstacle(list(history(tmp_path / "scored.jsonl")), by_sampler=True) is None

    assert {record["chat_template_hash"] for record in again} == {hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16]}
    again[0]["chat_template_hash"] = "0" * 16
    again[2]["response_token_ids"][1] = [5] * len(again[2]["response_token_ids"][1])  # as of another tokenizer
    score(policy, write_jsonl(merged, again), tmp_path / "other.jsonl")
    noted = read_manifest(tmp_path / "other.jsonl")["noted"]
    (other,) = (note for note in noted if note.startswith("sampled with another chat template"))
    assert noted[other] == {"responses": len(again[0]["responses"]), "prompts": [again[0]["id"]]}
    assert "tokenised 1 responses again" in obstacle(list(history(tmp_path / "other.jsonl")), by_sampler=True)


def score(policy: Path, source: Path, output: Path) -> list[dict]:
    """The records with the policy's log-probabilities as get_logps.py computes them."""
    words = ["annotate_data/get_logps.py", "--dataset_name_or_path", source, "--output_dir", output, "--dtype", "float32"]
    succeed(*words, "--models", f"policy={policy}")
    return read_jsonl(output)


def test_sampling_from_generated_records_keeps_nothing_of_their_responses(policy, tmp_path):
    stale = {"prompt": "film", "responses": ["a"], "response_token_ids": [[5]], "response_logps": [[-1.0]], "rewards": [1.0]}
    (record,) = generate(policy, write_jsonl(tmp_path / "p.jsonl", [stale]), tmp_path / "gen", "--backend", "hf")
    assert record.keys() == {"id", "prompt", "responses", "response_token_ids", "finish_reasons", "chat_template_hash"}


def test_the_models_own_generation_settings_do_not_change_what_is_sampled(policy, prompts, tmp_path):
    records = generate(policy, prompts, tmp_path / "gen", "--backend", "hf")
    assert all(len(set(record["responses"])) == K for record in records)  # its min-p of 1 would be greedy


def test_a_stop_string_in_the_name_of_a_special_token_stops_nothing(policy, prompts, tmp_path):
    records = generate(policy, prompts, tmp_path / "gen", "--backend", "hf", "--stop", "assist", "--max_new_tokens", 100)
    sampled = [ids for record in records for ids in record["response_token_ids"]]
    assert any(3 in ids[:-1] for ids in sampled)  # <|assistant|>
    assert not any(ids[-1] == ids[-2] == 0 for ids in sampled if len(ids) > 1)  # no padding


def test_servers_that_are_not_vllm_are_refused(tmp_path):
    from tests.inference.misbehaving_server import MisbehavingServer

    prompts = write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    with MisbehavingServer() as server:
        flags = ["--dataset_name_or_path", prompts, "--output_dir", tmp_path / "o.jsonl", "--response_logps"]
        done = run_program("generation/gen_hf.py", "--ports", server.port, *flags)
    assert done.returncode == 2
    assert "--response_logps are vLLM's own; these servers are not vLLM" in done.stderr
