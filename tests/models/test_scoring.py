"""What a batch of sequences scores is what each sequence scores alone, by the model's own forward pass."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, LlamaConfig

from baton.models import loading
from baton.models.attention import NAME
from baton.models.forward import attention
from baton.models.scoring import next_token_shares, packed_response_logps, response_logps, rewards
from tests.models.tiny_models import FAMILIES, SHAPE, VOCABULARY, model_of

random_ids = random.Random(0)
SEQUENCES = [[random_ids.randrange(3, VOCABULARY) for _ in range(length)] for length in (9, 4, 40, 17, 2)]


def logits_alone(model, sequence: list[int]) -> torch.Tensor:
    """The logits (L, outputs), or (outputs,) of a classifier, of the model's own forward pass on one sequence."""
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0]


def test_rewards_are_those_of_each_sequence_alone_also_where_it_ends_with_padding():
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_labels=1)
    model = loading.place(AutoModelForSequenceClassification.from_config(config).eval(), torch.device("cpu"))
    sequences = [*SEQUENCES, [*SEQUENCES[0], config.pad_token_id]]
    expected = [logits_alone(model, sequence).item() for sequence in sequences]
    assert rewards(model, sequences) == pytest.approx(expected, abs=1e-5)


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
    read = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    with attention(model, NAME):
        found = dict(packed_response_logps(model, sequences, tokens_per_row))
    hook.remove()
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
    model = loading.place(loading.load(AutoModelForCausalLM, str(tmp_path), "float32"), torch.device("cpu"))
    assert isinstance(model.config, Gemma2Config)
    expected = response_logps(model_of("gemma2"), SEQUENCES, [1] * len(SEQUENCES))
    assert response_logps(model, SEQUENCES, [1] * len(SEQUENCES)) == pytest.approx(expected, abs=1e-4)
