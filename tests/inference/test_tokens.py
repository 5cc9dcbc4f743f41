"""The text that an engine writes for its token ids, with a tokenizer whose decoder strips the first space."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotate_data.demonstrations import best_of_n, conditional
from baton.drops import Drops
from baton.models.templates import decodes_to, load_tokenizer, prompt_token_ids, response_text
from tests.inference.tiny_policy import make_tiny_policy
from tests.models.test_templates import KINDS
from tests.programs import read_jsonl, succeed, write_jsonl

PROMPT = [{"role": "user", "content": "A film?"}]


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_ids_is_the_one_that_vllm_writes(kind, data):
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    tokenizer = KINDS[kind]
    prompt_ids = prompt_token_ids(tokenizer, PROMPT, "here")
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    request = EngineCoreRequest(
        request_id="1", prompt_token_ids=prompt_ids, mm_features=None, sampling_params=SamplingParams(), pooling_params=None,
        arrival_time=0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    vllm = FastIncrementalDetokenizer(tokenizer, request)
    for id_ in ids:
        vllm.update([id_], False)
    assert vllm.output_text == response_text(tokenizer, prompt_ids, ids)
    assert decodes_to(tokenizer, ids, vllm.output_text)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny policy with a tokenizer that adds a space before each text and strips it again."""
    from transformers import AutoModelForCausalLM

    folder = make_tiny_policy(tmp_path_factory.mktemp("policy"))
    tokenizer = KINDS["metaspace"]
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_what_an_engine_samples_is_known_again_by_its_text(policy, tmp_path, backend):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"the film number {n}"} for n in range(6)])
    succeed(
        "generation/get_hf2.py", "--model_name_or_path", policy, "--dataset_name_or_path", prompts, "--backend", backend,
        "--output_dir", tmp_path / "gen", "--K", 8, "--max_new_tokens", 12, "--enforce_eager", "true",
    )  # fmt: skip
    tokenizer = load_tokenizer(str(policy))
    records = read_jsonl(tmp_path / "gen0.jsonl")
    sampled = [
        (text, ids) for record in records for text, ids in zip(record["responses"], record["response_token_ids"], strict=True)
    ]
    assert len(sampled) == 48 and any(text.startswith(" ") for text, _ in sampled)
    assert [(text, ids) for text, ids in sampled if not decodes_to(tokenizer, ids, text)] == []


def test_a_demonstration_carries_what_was_sampled():
    record = {
        "id": "a", "prompt": PROMPT, "responses": ["A mess", "A sea."], "response_token_ids": [[5, 6], [7, 2]],
        "finish_reasons": ["length", "stop"], "rewards": [0.5, 0.0],
    }  # fmt: skip
    (best,) = best_of_n(iter([("here", record)]), None, Drops())
    assert (best["response_token_ids"], best["finish_reason"], best["reward"]) == ([5, 6], "length", 0.5)
    made = list(conditional(iter([("here", record)]), [0.25], ["poor", "good"]))
    assert [(demo["response_token_ids"], demo["finish_reason"]) for demo in made] == [([5, 6], "length"), ([7, 2], "stop")]
    (best,) = best_of_n(iter([("here", {"id": "a", "prompt": PROMPT, "responses": ["x"], "rewards": [1.0]})]), None, Drops())
    assert "response_token_ids" not in best and "finish_reason" not in best
