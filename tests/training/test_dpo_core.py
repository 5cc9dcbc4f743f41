"""The packed forward pass gives the numbers of the padded one: log-probabilities, losses, gradients, training steps."""

import copy
import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from trl import DPOConfig

from baton.errors import InputError
from dpo_iteration.attention import NAME, block_mask
from dpo_iteration.forward import attention, score, share_prefixes
from dpo_iteration.logps import token_scores
from dpo_iteration.reference import kept_reference_logps, reference_logps
from dpo_iteration.trainer import PackedDPOTrainer
from dpo_iteration.trees import pack

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
    "gemma2": Gemma2Config(**SHAPE, **WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**SHAPE, **WINDOW, query_pre_attn_scalar=8),
    "mistral": MistralConfig(**SHAPE, sliding_window=5),
}
tokens = st.integers(3, VOCABULARY - 1)
prompts = st.lists(tokens, min_size=1, max_size=LENGTH_LIMIT // 2)
responses = st.lists(tokens, min_size=1, max_size=LENGTH_LIMIT // 2)


def model_of(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return model_of(request.param)


def logps_alone(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities of the response's tokens by the model's own forward pass on this one sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)


def logps_packed(model, sequences, tokens_per_row=None) -> list[torch.Tensor]:
    with attention(model, NAME):
        scores, slices = score(model, sequences, tokens_per_row)
    return [scores.log_probs[part] for part in slices]


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


# Packing


@given(
    st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)), min_size=1, max_size=12),
    st.none() | st.integers(1, 30),
)
def test_every_response_token_is_scored_once_at_its_place(sequences, tokens_per_row):
    rows, places = pack(sequences, tokens_per_row)
    for (_, response), place in zip(sequences, places, strict=True):
        assert place.length == len(response)
        scored = rows[place.row].targets[place.start : place.start + place.length]
        assert scored.tolist() == list(response)
    distinct = {(tuple(prompt), tuple(response)) for prompt, response in sequences}
    assert sum(len(row.targets) for row in rows) == sum(len(response) for _, response in distinct)


@given(
    st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)), min_size=1, max_size=12),
    st.integers(1, 30),
)
def test_rows_keep_to_the_token_budget_unless_one_sequence_exceeds_it(sequences, tokens_per_row):
    rows, _ = pack(sequences, tokens_per_row)
    for row in rows:
        assert len(row.input_ids) == row.layout.length
        alone = len(row.layout.trees) == 1 and len(row.layout.trees[0][1]) == 1
        assert len(row.input_ids) <= tokens_per_row or alone


def test_a_prompt_is_laid_down_once_for_all_its_responses():
    (row,), _ = pack([([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([5, 6, 7], [8, 9])], None)
    assert row.input_ids.tolist() == [5, 6, 7, 8]
    assert row.position_ids.tolist() == [0, 1, 2, 3]
    assert row.targets.tolist() == [8, 9, 10]
    assert row.predictors.tolist() == [2, 3, 2]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="sequence 1 has an empty prompt"):
        pack([([3], [4]), ([], [4])], None)


# Log-probabilities


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_packed_logps_are_those_of_each_sequence_alone(model, data):
    some_prompts = data.draw(st.lists(prompts, min_size=1, max_size=3))
    sequences = data.draw(st.lists(st.tuples(st.sampled_from(some_prompts), responses), min_size=1, max_size=6))
    tokens_per_row = data.draw(st.none() | st.integers(10, 120))
    with torch.no_grad():
        packed = logps_packed(model, sequences, tokens_per_row)
        for (prompt, response), logps in zip(sequences, packed, strict=True):
            torch.testing.assert_close(logps, logps_alone(model, prompt, response), atol=2e-5, rtol=1e-4)


def test_gradients_are_those_of_the_sequences_alone(model):
    sequences = [(row["prompt_ids"], row[side]) for row in random_pairs(4) for side in ("chosen_ids", "rejected_ids")]
    weights = torch.linspace(-1, 1, len(sequences))
    parameters = list(model.parameters())

    packed = logps_packed(model, sequences, 60)
    gradients = torch.autograd.grad(sum(w * p.sum() for w, p in zip(weights, packed, strict=True)), parameters)
    alone = [logps_alone(model, *sequence) for sequence in sequences]
    expected = torch.autograd.grad(sum(w * p.sum() for w, p in zip(weights, alone, strict=True)), parameters)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_scores_equal_the_full_softmax(softcap, scale, with_bias):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    bias = torch.randn(11, requires_grad=True) if with_bias else None
    targets = torch.randint(11, (7,))
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    upstream = torch.randn(7)

    scores = token_scores(hidden, weight, bias, targets, scale=scale, softcap=softcap, chunk_bytes=2 * 4 * 11)
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    full = logits.log_softmax(-1)
    logps = full.gather(1, targets[:, None]).squeeze(1)

    torch.testing.assert_close(scores.log_probs, logps)
    torch.testing.assert_close(scores.entropy, -(full.exp() * full).sum(-1))
    torch.testing.assert_close(scores.mean_logits, logits.mean(-1))
    torch.testing.assert_close(scores.log_sum_sq_probs, full.exp().square().sum(-1).log())
    assert scores.is_top1.tolist() == (logits.argmax(-1) == targets).tolist()
    gradients = torch.autograd.grad((scores.log_probs * upstream).sum(), inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad((logps * upstream).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, wanted)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=3)), min_size=1, max_size=4),
    st.none() | st.integers(1, 6),
    st.integers(0, 3),
)
@settings(max_examples=30, deadline=None)
def test_the_flex_mask_lets_a_token_see_its_own_past_and_nothing_else(trees, window, padding):
    sequences = [([3 + t] * prompt, [3 + t] * (r + 1)) for t, (prompt, sizes) in enumerate(trees) for r in sizes or [0]]
    (row,), _ = pack(sequences, None)
    owner = []  # (tree, response or None for the prompt, position) of every token
    for tree, (prompt, sizes) in enumerate(row.layout.trees):
        owner += [(tree, None, position) for position in range(prompt)]
        owner += [(tree, r, prompt + i) for r, size in enumerate(sizes) for i in range(size)]
    mask = block_mask(row.layout, len(owner) + padding, window, torch.device("cpu")).mask_mod
    for q, (tree, response, position) in enumerate(owner):
        for k, (other_tree, other_response, other_position) in enumerate(owner):
            in_past = tree == other_tree and other_position <= position and other_response in (None, response)
            in_window = window is None or position - other_position < window
            assert bool(mask(0, 0, torch.tensor(q), torch.tensor(k))) == (in_past and in_window)


# Losses against TRL's own


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def trainer_of(model, rows, tokenizer, folder, packed=True, margin_scale=0.0, tokens_per_row=None, lora=False, **config):
    arguments = {"gradient_checkpointing": False, "report_to": "none", "use_cpu": True, "max_length": None, "beta": 0.3}
    return PackedDPOTrainer(
        copy.deepcopy(model),
        args=DPOConfig(str(folder), **{**arguments, "save_strategy": "no", "disable_tqdm": True, **config}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
        packed=packed,
        margin_scale=margin_scale,
        tokens_per_row=tokens_per_row,
    )


def loss_and_gradients(trainer, rows) -> tuple[float, dict[str, torch.Tensor], dict]:
    batch = trainer.data_collator([{name: row[name] for name in row if name != "id"} for row in rows])
    if not trainer._margin_scale:
        batch.pop("margin", None)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def with_reference(rows: list[dict], model, seed: int = 1) -> list[dict]:
    """Rows with reference log-probabilities that are some nats away from the model's, as after some training."""
    rng = random.Random(seed)
    logps = reference_logps(model, pairs_of(rows)).tolist()
    return [
        {**row, "ref_chosen_logps": chosen + rng.uniform(-2, 2), "ref_rejected_logps": rejected + rng.uniform(-2, 2)}
        for row, (chosen, rejected) in zip(rows, logps, strict=True)
    ]


LOSSES = {
    **{name: {"loss_type": [name]} for name in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    )},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "weighted sum": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.4},
    "weighting": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def trainers(request, tokenizer, tmp_path_factory):
    """The packed trainer and TRL's forward pass on the same model and rows; with what any loss needs of the model."""
    model = model_of(request.param)
    rows = with_reference(random_pairs(5), model)
    folder = tmp_path_factory.mktemp(request.param)
    ours = trainer_of(model, rows, tokenizer, folder, tokens_per_row=70, use_weighting=True)
    return ours, trainer_of(model, rows, tokenizer, folder, packed=False, use_weighting=True), rows


def set_loss(trainer, config: dict) -> None:
    """Give a trainer the loss settings that TRL's constructor would have read from `config`."""
    settings = {"loss_type": ["sigmoid"], "loss_weights": None, "label_smoothing": 0.0, "ld_alpha": None,
                "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False} | config  # fmt: skip
    trainer.loss_types = settings.pop("loss_type")
    trainer.loss_weights = settings.pop("loss_weights") or [1.0] * len(trainer.loss_types)
    for name, value in settings.items():
        setattr(trainer, name, value)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradients_and_metrics_are_those_of_trl(loss, trainers):
    ours, trls, rows = trainers
    for trainer in (ours, trls):
        set_loss(trainer, LOSSES[loss])
    value, gradients, metrics = loss_and_gradients(ours, rows)
    wanted_value, wanted_gradients, wanted_metrics = loss_and_gradients(trls, rows)
    assert value == pytest.approx(wanted_value, rel=1e-4)
    assert metrics == pytest.approx(wanted_metrics, rel=1e-4, abs=1e-5)
    assert gradients.keys() == wanted_gradients.keys()
    largest = max(gradient.norm() for gradient in wanted_gradients.values())
    assert largest > 0
    for name, wanted in wanted_gradients.items():
        assert (gradients[name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6 * largest, name
