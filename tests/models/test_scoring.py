"""What a batch of sequences scores is what each sequence scores alone, by the model's own forward pass."""

import copy
import random
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config

from baton.models import loading
from baton.models.attention import NAME
from baton.models.forward import attention
from baton.models.scoring import (
    Packing,
    next_token_shares,
    packed_response_logps,
    packed_rewards,
    read_part,
    response_logps,
    rewards,
)
from baton.models.trees import with_prompts
from tests.models.tiny_models import FAMILIES, VOCABULARY, model_of

random_ids = random.Random(0)
SEQUENCES = [[random_ids.randrange(3, VOCABULARY) for _ in range(length)] for length in (9, 4, 40, 17, 2)]


def logits_alone(model, sequence: list[int]) -> torch.Tensor:
    """The logits (L, outputs), or (outputs,) of a classifier, of the model's own forward pass on one sequence."""
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0]


def reward_model(family: str):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_those_of_each_sequence_alone_packed_or_not_also_where_it_ends_with_padding(family):
    model, prompt = reward_model(family), SEQUENCES[0]
    sequences = [*SEQUENCES, prompt, [*prompt, 5, 6, 7], [*prompt, 9], [*prompt, model.config.pad_token_id]]
    expected = [logits_alone(model, sequence).item() for sequence in sequences]
    assert rewards(loading.place(model, torch.device("cpu"), "float32"), sequences) == pytest.approx(expected, abs=1e-5)
    groups = [sequences[:3], sequences[3:5], sequences[5:]]
    trees = [tree for group in groups for tree in with_prompts([read_part(model, ids) for ids in group])]
    assert Packing(model).agreed(trees, 100)
    for tokens_per_row in (16, 1000):
        with tokens_read(model) as read:
            found = dict(packed_rewards(model, trees, tokens_per_row))
        assert [found[i] for i in range(len(sequences))] == pytest.approx(expected, abs=1e-5)
        if tokens_per_row == 1000:
            assert sum(read) == (4 + 40) + (17 + 2) + (9 + 3 + 1)


@pytest.mark.parametrize("kind", [reward_model, model_of])
def test_where_the_first_rows_states_are_not_the_models_own_sequences_are_padded_from_then_on(kind, monkeypatch, caplog):
    model, trees = kind("llama"), [(SEQUENCES[0], SEQUENCES[1]), (SEQUENCES[0], SEQUENCES[3])]
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr("baton.models.attention.by_trees", lambda query, *_: query)
        packing = Packing(model)
        packing.checked = False  # as on a GPU
        with caplog.at_level("INFO"):
            assert [packing.agreed(trees, 1000) for _ in range(2)] == [not wrong] * 2
        assert len(caplog.records) == 1 and ("Sequences are padded instead" in caplog.text) == wrong
        assert (model.config._attn_implementation == NAME) == (not wrong)
        caplog.clear()
        model.config._attn_implementation = packing.own


def test_what_a_cpu_computes_slowly_it_computes_in_float32_unless_told_otherwise(monkeypatch):
    for native, dtype, computed in ((False, "auto", "float32"), (True, "auto", "bfloat16"), (False, "bfloat16", "bfloat16")):
        monkeypatch.setattr(loading, "cpu_has_bfloat16", lambda native=native: native)
        model = loading.place(model_of("llama").bfloat16(), torch.device("cpu"), dtype)
        assert str(model.dtype) == f"torch.{computed}"


@contextmanager
def tokens_read(model):
    """Context in which the numbers of tokens of each forward pass are collected."""
    read = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    yield read
    hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_response_logps_are_those_of_each_sequence_alone(family):
    model, prompts = model_of(family), [3, 1, 25, 16, 1]
    expected = []
    for sequence, prompt in zip(SEQUENCES, prompts, strict=True):
        logps = logits_alone(model, sequence).log_softmax(-1)[prompt - 1 : -1]
        expected.append(logps.gather(1, torch.tensor(sequence[prompt:])[:, None]).sum().item())
    assert response_logps(model, SEQUENCES, prompts) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tokens_per_row", [16, 1000])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_response_logps_are_those_of_each_sequence_alone_and_read_each_prompt_once_a_row(family, tokens_per_row):
    model = model_of(family)
    prompt, short, _, long, _ = SEQUENCES
    sequences = [(prompt, short), (long, prompt), (prompt, long), (prompt, []), (prompt, short)]
    with attention(model, NAME), tokens_read(model) as read:
        found = dict(packed_response_logps(model, sequences, tokens_per_row))
    whole, prompts = [[*before, *after] for before, after in sequences], [len(before) for before, _ in sequences]
    expected = response_logps(model, whole, prompts)
    assert [found[i] for i in range(5)] == pytest.approx(expected, abs=1e-4)
    if tokens_per_row == 1000:
        assert sum(read) == (9 + 3 + 16) + (17 + 8)


def test_shares_of_next_tokens_are_those_after_each_sequence_alone():
    model, tokens = model_of("llama"), [7, 5, 11]
    for sequence, shares in zip(SEQUENCES, next_token_shares(model, SEQUENCES, tokens), strict=True):
        assert shares == pytest.approx(logits_alone(model, sequence)[-1, tokens].softmax(-1).tolist(), abs=1e-6)


def test_a_model_that_caps_its_attention_scores_is_loaded_with_an_attention_that_does(tmp_path):
    model_of("gemma2").save_pretrained(tmp_path)
    model = loading.place(loading.load(AutoModelForCausalLM, str(tmp_path), "float32"), torch.device("cpu"), "float32")
    assert isinstance(model.config, Gemma2Config)
    expected = response_logps(model_of("gemma2"), SEQUENCES, [1] * len(SEQUENCES))
    assert response_logps(model, SEQUENCES, [1] * len(SEQUENCES)) == pytest.approx(expected, abs=1e-4)
