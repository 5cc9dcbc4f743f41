"""The packed forward pass gives the padded one's numbers: log-probabilities, losses, gradients, weights."""

import copy
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch.nn.attention.flex_attention import flex_attention
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
from baton.models.attention import NAME, block_mask, shared_prefix_attention
from baton.models.forward import attention, score, share_prefixes
from baton.models.logps import token_scores
from baton.models.trees import pack
from baton.training.reference import kept_reference_logps, reference_logps
from dpo_iteration.run_dpo import LOSS_TYPES
from dpo_iteration.trainer import PackedDPOTrainer

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
    st.lists(
        st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)),
        min_size=1,
        max_size=12,
    ),
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
    st.lists(
        st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)),
        min_size=1,
        max_size=12,
    ),
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


@settings(max_examples=15)
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
@settings(max_examples=30)
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("heads", [4, 6])
def test_both_kinds_of_attention_agree(heads, window):
    torch.manual_seed(0)
    sequences = [([3] * 30, [4] * 150), ([3] * 30, [5] * 9), ([6] * 5, [7] * 40)]
    (row,), _ = pack(sequences, None)
    length = 256  # the row and some padding
    query, key, value = (torch.randn(1, count, length, 16) for count in (heads, 2, 2))
    blocks, _ = shared_prefix_attention(None, query, key, value, layout=row.layout, sliding_window=window)
    mask = block_mask(row.layout, length, window, torch.device("cpu"))
    flex = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
    used = row.layout.length
    torch.testing.assert_close(blocks[:, :used], flex.transpose(1, 2)[:, :used])


# Losses against TRL's own


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def trainer_of(model, rows, tokenizer, folder, packed=True, margin_scale=0.0, tokens_per_row=4096, lora=False, **config):
    arguments = {
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "use_cpu": True,
        "max_length": None,
        "beta": 0.3,
    }
    needs_reference = not lora and "ref_chosen_logps" not in rows[0]
    return PackedDPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(model) if needs_reference else None,
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
    """Rows whose reference log-probabilities are some nats away from the model's."""
    rng = random.Random(seed)
    logps = reference_logps(model, pairs_of(rows)).tolist()
    return [
        {
            **row,
            "ref_chosen_logps": chosen + rng.uniform(-2, 2),
            "ref_rejected_logps": rejected + rng.uniform(-2, 2),
        }
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
    """The packed trainer and TRL's forward pass on the same model and rows, ready for every loss."""
    model = model_of(request.param)
    rows = with_reference(random_pairs(5), model)
    folder = tmp_path_factory.mktemp(request.param)
    ours = trainer_of(model, rows, tokenizer, folder, tokens_per_row=70, use_weighting=True)
    return ours, trainer_of(model, rows, tokenizer, folder, packed=False, use_weighting=True), rows


def set_loss(trainer, config: dict) -> None:
    """Give a trainer the loss settings that TRL's constructor would have read from `config`."""
    defaults = {
        "loss_type": ["sigmoid"],
        "loss_weights": None,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
    }
    settings = {**defaults, **config}
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


# Training


@pytest.mark.parametrize("setting", [{}, {"gradient_checkpointing": True}, {"lora": True}, {"tokens_per_row": 60}])
def test_training_steps_are_those_of_trl(setting, tokenizer, tmp_path):
    rows = random_pairs(12)
    config = {
        "per_device_train_batch_size": 3,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **setting,
    }
    losses, weights = {}, {}
    for packed in (True, False):
        trainer = trainer_of(model_of("llama"), rows, tokenizer, tmp_path, packed=packed, **config)
        trainer.train()
        losses[packed] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights[packed] = trainer.model.state_dict()
    assert len(losses[True]) == 4
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, atol=2e-4, rtol=1e-3)


def test_training_bf16_weights_follows_trl(tokenizer, tmp_path):
    rows = random_pairs(6)
    values = {}
    for packed in (True, False):
        model = model_of("llama").to(torch.bfloat16)
        trainer = trainer_of(model, with_reference(rows, model), tokenizer, tmp_path, packed=packed, bf16=True)
        values[packed], gradients, _ = loss_and_gradients(trainer, trainer.train_dataset.to_list())
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert values[True] == pytest.approx(values[False], rel=0.05)


def test_the_margin_is_an_offset_in_the_sigmoid_and_metrics_do_not_see_it(tokenizer, tmp_path):
    model = model_of("llama")
    rows = with_reference(random_pairs(5), model)
    plain = trainer_of(model, rows, tokenizer, tmp_path)
    trainer = trainer_of(model, rows, tokenizer, tmp_path, margin_scale=0.7)
    loss, _, metrics = loss_and_gradients(trainer, rows)
    _, _, plain_metrics = loss_and_gradients(plain, rows)

    policy = reference_logps(model, pairs_of(rows))
    reference = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    margin = torch.tensor([row["margin"] for row in rows])
    chosen, rejected = (policy - reference).unbind(1)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected) - 0.7 * margin).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert metrics == pytest.approx(plain_metrics)
    assert trainer._total_train_tokens == plain._total_train_tokens


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.3, 0.8]},
        {"ld_alpha": 0.4, "use_weighting": True},
        {"lora": True},
    ],
)
def test_the_loss_with_a_margin_and_its_gradients_are_trls_with_a_reference_that_much_surer_of_the_chosen(
    config, packed, tokenizer, tmp_path
):
    model = model_of("llama")
    rows = with_reference(random_pairs(5), model)
    surer = [{**row, "ref_chosen_logps": row["ref_chosen_logps"] + 0.7 / 0.3 * row["margin"]} for row in rows]
    outcomes = []
    for data, margin_scale in ((rows, 0.7), (surer, 0.0)):
        torch.manual_seed(0)  # an adapter's first weights
        outcomes.append(loss_and_gradients(trainer_of(model, data, tokenizer, tmp_path, packed, margin_scale, **config), data))
    (loss, gradients, _), (wanted_loss, wanted, _) = outcomes
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": ["ipo"]}, "margin_scale needs loss_type sigmoid"),
        ({"f_divergence_type": "forward_kl"}, "margin_scale needs f_divergence_type reverse_kl"),
    ],
)
def test_a_margin_with_another_loss_is_refused(config, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        trainer_of(model_of("llama"), random_pairs(3), tokenizer, tmp_path, margin_scale=1.0, **config)


def test_the_loss_types_are_those_that_trl_names():
    named = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    assert sorted(named) == sorted(LOSS_TYPES)


def test_a_margin_scale_without_margins_is_refused(tokenizer, tmp_path):
    rows = [{name: row[name] for name in row if name != "margin"} for row in random_pairs(3)]
    with pytest.raises(InputError, match="needs a `margin` in every row"):
        trainer_of(model_of("llama"), rows, tokenizer, tmp_path, margin_scale=1.0)


def test_an_architecture_that_cannot_be_packed_is_padded_and_says_so(tokenizer, tmp_path, caplog):
    rows = random_pairs(4)
    with caplog.at_level(logging.WARNING, logger="dpo_iteration.trainer"):
        trainer = trainer_of(bloom(), rows, tokenizer, tmp_path, max_steps=1, logging_steps=1)
    assert caplog.text.count("BloomForCausalLM: its attention does not go through") == 1
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_generation_and_plain_calls_are_untouched():
    model = model_of("gemma2")
    ids = torch.tensor([[3, 4, 5, 6]])
    logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    share_prefixes(model)
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)


# The reference


def bloom():
    """A model whose attention is its own: it cannot be packed."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("build", [lambda: model_of("llama"), bloom], ids=["llama", "bloom"])
@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_reference_logps_are_those_of_trl(ld_alpha, build, tokenizer, tmp_path):
    model, rows = build(), random_pairs(7)
    trainer = trainer_of(model, rows, tokenizer, tmp_path, packed=False, ld_alpha=ld_alpha)
    batch = trainer.data_collator([{name: row[name] for name in row if name != "margin"} for row in rows])
    wanted = torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), dim=1)
    for tokens_per_row in (50, 10_000):
        logps = reference_logps(model, pairs_of(rows), tokens_per_row, ld_alpha)
        torch.testing.assert_close(logps, wanted, rtol=1e-4, atol=1e-4)


def test_reference_logps_are_computed_once_and_again_only_for_another_key_or_data(tmp_path):
    loads = []

    def load():
        loads.append(1)
        return model_of("llama")

    pairs = pairs_of(random_pairs(5))
    first = kept_reference_logps(pairs, load, tmp_path, ["model-a"])
    np.testing.assert_array_equal(kept_reference_logps(pairs, load, tmp_path, ["model-a"]), first)
    assert len(loads) == 1
    kept_reference_logps(pairs, load, tmp_path, ["model-b"])
    kept_reference_logps(pairs[:4], load, tmp_path, ["model-a"])
    kept_reference_logps(pairs, load, tmp_path, ["model-a"], ld_alpha=0.5)
    assert len(loads) == 4
    assert len(list(tmp_path.glob("*.npy"))) == 4
    assert not list(tmp_path.glob("*.partial"))


# Several processes


def run_processes(mode: str, count: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    program = Path(__file__).with_name("dpo_processes.py")
    with subprocess.Popen(
        [*command, program, mode, folder],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            raise
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture
def run_folder(tokenizer, tmp_path):
    model_of("llama-tied").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model = model_of("llama-tied")
    (tmp_path / "rows.json").write_text(json.dumps(with_reference(random_pairs(12), model)))
    return tmp_path


def test_two_processes_train_as_one(run_folder):
    for count in (1, 2):
        run_processes("ddp", count, run_folder)
    one, two = (json.loads((run_folder / f"losses-{count}.json").read_text()) for count in (1, 2))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)


def test_sharded_gradients_are_those_of_the_whole_model(run_folder):
    run_processes("fully_shard", 2, run_folder)
