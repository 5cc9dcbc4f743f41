"""Models of 3 layers and random parameters, one of each family that packed trees must suit, and pairs for them to score."""

import copy
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
LENGTH_LIMIT = 48
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LENGTH_LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough that every token's context changes its log-probability
}
# Windows shorter than the sequences; three layers, so that Gemma 3's pattern is stated by layer_types
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    # Eager: older versions of transformers choose torch's attention for it, which leaves the soft cap out
    "gemma2": Gemma2Config(**SHAPE, **WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**SHAPE, **WINDOW, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()  # a model writes into its configuration


def random_pairs(count: int, seed: int = 0, longest: int = LENGTH_LIMIT // 2) -> list[dict]:
    """Tokenised pairs; among them repeated prompts, a one-token prompt, one-token and longest responses."""
    rng = random.Random(seed)

    def ids(length):
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    rows = [
        {
            "prompt_ids": ids(rng.randint(1, longest)),
            "chosen_ids": ids(rng.randint(1, longest)),
            "rejected_ids": ids(rng.randint(1, longest)),
            "margin": rng.uniform(0, 3),
        }
        for _ in range(count)
    ]
    rows[0]["prompt_ids"], rows[0]["chosen_ids"] = ids(1), ids(1)
    rows[1]["prompt_ids"], rows[1]["chosen_ids"] = rows[2]["prompt_ids"], rows[2]["chosen_ids"]
    rows[2]["rejected_ids"] = ids(longest)
    return rows


def pairs_of(rows: list[dict]) -> list[tuple]:
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
