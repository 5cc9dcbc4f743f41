"""A batch whose packed log-probabilities are not the model's own is refused, and rounding alone is not."""

import pytest
import torch

from baton.errors import InputError
from baton.models import attention
from baton.models.agreement import LIMITS, check_batch, check_packed
from baton.models.attention import by_trees
from baton.models.forward import share_prefixes
from baton.models.trees import Layout
from tests.models.tiny_models import FAMILIES, model_of, random_pairs

SEQUENCES = [(row["prompt_ids"], row[side]) for row in random_pairs(8) for side in ("chosen_ids", "rejected_ids")]


def check(family: str, dtype: torch.dtype, sequences=SEQUENCES) -> None:
    """`check_batch` of a tiny model on a right-padded batch."""
    model = model_of(family).to(dtype)
    share_prefixes(model)
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids, attended, completion = (torch.zeros(len(sequences), length, dtype=torch.int64) for _ in range(3))
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor([*prompt, *response])
        attended[row, :end] = 1
        completion[row, len(prompt) : end] = 1
    check_batch(model, ids, attended, completion, dtype, "Do as told.")


def one_tree(layout: Layout) -> Layout:
    return Layout([(layout.length, [])])


def responses_of_a_prompt_as_one(layout: Layout) -> Layout:
    return Layout([(prompt, [sum(responses)]) for prompt, responses in layout.trees])


def no_prompts(layout: Layout) -> Layout:
    return Layout([(length, []) for prompt, responses in layout.trees for length in (prompt, *responses)])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_attention_agrees_in_every_precision(family, dtype, caplog):
    with caplog.at_level("INFO"):
        check(family, dtype)
    assert "packed log-probabilities differ from the model's own by" in caplog.text


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("wrong", [one_tree, responses_of_a_prompt_as_one, no_prompts])
def test_an_attention_that_sees_what_it_must_not_or_less_than_it_must_is_refused(wrong, dtype, monkeypatch):
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:3], wrong(a[3]), *a[4:]))
    with pytest.raises(InputError, match=r"differ from the model's own by .* nats .* rounding in .* Do as told\."):
        check("llama", dtype)


def test_a_window_one_token_short_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:6], a[6] and a[6] - 1, a[7]))
    with pytest.raises(InputError, match="differ from the model's own"):
        check("gemma3", torch.bfloat16)


def test_numbers_that_are_none_are_refused():
    packed = [torch.full((len(response),), torch.nan) for _, response in SEQUENCES]
    with pytest.raises(InputError, match="by inf nats"):
        check_packed(model_of("llama"), SEQUENCES, packed, torch.float32, "")


def test_sequences_without_a_response_and_of_one_token_are_compared_too():
    check("llama", torch.float32, [([3, 4, 5], []), ([3], [4]), *SEQUENCES[:2]])
