"""Token in, token out: what is trained on is what the policy sampled, and it learns to stop only where it stopped."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InputError
from baton.preferences import preference_of
from baton.stage import Drops
from baton.templates import decodes_to, load_tokenizer, response_pieces, response_token_ids
from dpo_iteration.rows import token_rows
from tests.programs import write_jsonl

PROMPT = [{"role": "user", "content": "Continue this review: It opens at sea."}]


@pytest.fixture(scope="module")
def tokenizer(task):
    return load_tokenizer(str(task / "base"))


def rows_of(pair, tokenizer, tmp_path, max_length=256, max_prompt_length=128):
    """The rows, drops and counts that one pair gives."""
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"id": "a", "prompt": PROMPT, **pair}])
    drops, counted = Drops(), Counter()
    return list(token_rows(path, tokenizer, max_length, max_prompt_length, drops, counted)), drops, counted


def letters(tokenizer, text):
    """Token ids of a text, letter by letter: never what the tokenizer itself would make of it."""
    return [id_ for letter in text for id_ in tokenizer(letter, add_special_tokens=False)["input_ids"]]


def test_sampled_token_ids_are_trained_on_as_they_are(tokenizer, tmp_path):
    sampled = [*letters(tokenizer, "A warm film."), tokenizer.eos_token_id]
    assert sampled[:-1] != tokenizer("A warm film.", add_special_tokens=False)["input_ids"]
    pair = {"chosen": "A warm film.", "rejected": "A mess.", "chosen_token_ids": sampled, "chosen_finish_reason": "stop"}
    (row,), _, counted = rows_of(pair, tokenizer, tmp_path)
    assert row["chosen_ids"] == sampled
    assert counted["responses with sampled token ids"] == counted["responses tokenised from text"] == 1


def test_token_ids_of_another_tokenizer_are_not_used(tokenizer, tmp_path):
    pair = {"chosen": "A warm film.", "rejected": "A mess.", "chosen_token_ids": [5, 6, 10**6]}
    (row,), _, counted = rows_of(pair, tokenizer, tmp_path)
    assert decodes_to(tokenizer, row["chosen_ids"], "A warm film.")
    assert counted["responses with sampled token ids"] == 0


@pytest.mark.parametrize(("reason", "stops"), [("stop", True), (None, True), ("length", False)])
def test_end_of_turn_is_learnt_only_where_the_policy_stopped(tokenizer, tmp_path, reason, stops):
    pair = {"chosen": "A warm film.", "rejected": "A mess.", "chosen_finish_reason": reason}
    (row,), _, _ = rows_of(pair, tokenizer, tmp_path)
    assert (row["chosen_ids"][-1] == tokenizer.eos_token_id) == stops


def test_long_prompts_are_dropped_by_name_and_long_responses_cut_without_an_end(tokenizer, tmp_path):
    pair = {"chosen": "warm " * 50, "rejected": "A mess."}
    rows, drops, _ = rows_of(pair, tokenizer, tmp_path, max_prompt_length=3)
    assert rows == [] and drops.names == {"prompt longer than max_prompt_length 3 tokens": ["a"]}
    (row,), drops, counted = rows_of(pair, tokenizer, tmp_path, max_length=40)
    assert len(row["prompt_ids"]) + len(row["chosen_ids"]) == 40 and not drops.counts
    assert counted["responses cut to max_length"] == 1
    assert tokenizer.eos_token_id not in row["chosen_ids"] and row["rejected_ids"][-1] == tokenizer.eos_token_id


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=3))
def test_pieces_of_a_conversation_are_the_conversation_and_mark_what_the_assistant_said(tokenizer, turns):
    messages = [
        message
        for user, assistant in turns
        for message in ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    ]
    pieces = response_pieces(tokenizer, messages, "here")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode([id_ for ids, _ in pieces for id_ in ids]) == whole[: whole.rindex(tokenizer.eos_token)] + (
        tokenizer.eos_token
    )
    assert [learnt for _, learnt in pieces] == [False, True] * len(turns)
    for (_, assistant), (ids, _) in zip(turns, pieces[1::2], strict=True):
        assert assistant.strip() in tokenizer.decode(ids)
    *_, last = turns
    assert pieces[-1][0] == response_token_ids(tokenizer, messages[:-1], last[1], True, "here")


OPENING = [{"role": "user", "content": "Hello"}]


def said(content):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hello", "chosen": "Good.", "rejected": "Bad."},
        {"prompt": OPENING, "chosen": [said("Good.")], "rejected": [said("Bad.")]},
        {"chosen": [*OPENING, said("Good.")], "rejected": [*OPENING, said("Bad.")]},
        {"prompt": "Hello", "chosen": [*OPENING, said("Good.")], "rejected": [*OPENING, said("Bad.")]},
        {"chosen": "\n\nHuman: Hello\n\nAssistant: Good.", "rejected": "\n\nHuman: Hello\n\nAssistant: Bad."},
    ],
)
def test_every_common_shape_of_a_preference_reads_the_same(record):
    assert preference_of(record, "here") == {"prompt": OPENING, "chosen": "Good.", "rejected": "Bad."}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hello", "chosen": "Good."}, "no `rejected`"),
        ({"chosen": "Good.", "rejected": "Bad."}, "no `prompt`"),
        ({"prompt": "Hello", "chosen": "", "rejected": "Bad."}, "`chosen` must end with a response"),
        ({"chosen": [*OPENING, said("Good.")], "rejected": [said("Hm"), said("Bad.")]}, "the same conversation"),
    ],
)
def test_bad_preference_says_what_is_wrong_with_it(record, message):
    with pytest.raises(InputError, match=f"here: .*{message}"):
        preference_of(record, "here")
