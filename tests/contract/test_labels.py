"""Labelled examples for KTO: every response becomes an example or a counted drop, by rules that a reader can check."""

import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import labels
from baton.drops import Drops
from baton.errors import InputError
from baton.labels import LabelSettings, check_both_kinds, labelled_examples

OPENING = [{"role": "user", "content": "Hello"}]


def said(content):
    return {"role": "assistant", "content": content}


@st.composite
def annotated(draw):
    """An annotated record of 1 to 6 responses, some with equal rewards, some cut off by length."""
    K = draw(st.integers(1, 6))
    return {
        "prompt": draw(st.sampled_from(["Hello", "Good evening"])),
        "responses": [f"response {i}" for i in range(K)],
        "response_token_ids": [[i] for i in range(K)],
        "finish_reasons": [draw(st.sampled_from(["stop", "length"])) for _ in range(K)],
        "rewards": [draw(st.sampled_from([-1.5, 0, 0.1, 0.3, 2])) for _ in range(K)],
        "source": "a test",
    }


thresholds = st.sampled_from([(None, None), (0.1, 0.1), (0.3, -1), (2.0, 0.0)])


def labelled(records, settings=None):
    drops, counted = Drops(), Counter()
    numbered = [(f"file:{i}", record) for i, record in enumerate(records, 1)]
    return list(labelled_examples(numbered, settings or LabelSettings(), drops, counted)), drops, counted


@given(st.lists(annotated(), max_size=5), thresholds, st.booleans())
def test_every_response_is_an_example_or_a_counted_drop(records, bounds, drop_truncated):
    examples, drops, counted = labelled(records, LabelSettings(*bounds, drop_truncated))
    assert counted["in"] == sum(len(record["responses"]) for record in records) == len(examples) + drops.counts.total()
    assert counted["desirable"] == sum(example["label"] for example in examples)
    assert counted["desirable"] + counted["undesirable"] == len(examples)


@given(annotated(), thresholds)
def test_annotated_responses_are_labelled_by_the_thresholds_or_by_the_mean_of_their_prompt(record, bounds):
    examples, drops, _ = labelled([record], LabelSettings(*bounds))
    above, below = bounds if bounds[0] is not None else [statistics.mean(record["rewards"])] * 2
    found = {example["completion"]: example["label"] for example in examples}
    expected = dict(zip(record["responses"], record["rewards"], strict=True))
    assert found == {text: reward > above for text, reward in expected.items() if reward > above or reward < below}
    assert set(drops.counts) <= {labels.BETWEEN if bounds[0] is not None else labels.AT_MEAN}


@given(st.floats(-1e6, 1e6), st.integers(1, 9))
def test_equal_rewards_are_neither_better_nor_worse_than_their_mean(reward, K):
    examples, drops, _ = labelled([{"prompt": "Hello", "responses": ["a"] * K, "rewards": [reward] * K}])
    assert examples == [] and drops.counts == {labels.AT_MEAN: K}


def test_an_example_carries_what_was_sampled_its_reward_and_unknown_keys():
    record = {
        "id": "a",
        "prompt": "Hello",
        "responses": ["", "y"],
        "rewards": [1, 2],
        "rewards_by": {"bt": [1, 2]},
        "label": 7,
    }
    record |= {"response_token_ids": [[3], [4]], "finish_reasons": ["stop", "length"], "source": "z"}
    shared = {"id": "a", "prompt": OPENING, "source": "z"}
    of_x = {"completion": "", "completion_token_ids": [3], "completion_finish_reason": "stop", "completion_reward": 1}
    of_y = {"completion": "y", "completion_token_ids": [4], "completion_finish_reason": "length", "completion_reward": 2}
    examples, _, _ = labelled([record])
    assert examples == [{**shared, **of_x, "label": False}, {**shared, **of_y, "label": True}]
    assert labelled(examples)[0] == examples  # the output is input of the same kind
    (kept,), drops, _ = labelled(examples, LabelSettings(drop_truncated=True))
    assert kept["completion"] == "" and drops.names == {labels.TRUNCATED: ["a"]}


@pytest.mark.parametrize("prompt", ["Hello", OPENING])
@pytest.mark.parametrize("completion", ["Good.", [said("Good.")]])
@pytest.mark.parametrize("key", ["completion", "response"])
@pytest.mark.parametrize(
    ("label", "good"), [(True, True), (False, False), (1, True), (0.0, False), ("true", True), ("False", False)]
)
def test_texts_and_messages_read_the_same(prompt, completion, key, label, good):
    (example,), _, _ = labelled([{"prompt": prompt, key: completion, "label": label}])
    assert {**example, "id": ""} == {"id": "", "prompt": OPENING, "completion": "Good.", "label": good}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hello", "chosen": "Good.", "rejected": "Bad."},
        {"chosen": [*OPENING, said("Good.")], "rejected": [*OPENING, said("Bad.")]},
        {"chosen": "\n\nHuman: Hello\n\nAssistant: Good.", "rejected": "\n\nHuman: Hello\n\nAssistant: Bad."},
    ],
)
def test_a_pair_is_one_desirable_and_one_undesirable_example(record):
    own = {"chosen_token_ids": [1], "rejected_token_ids": [2], "chosen_reward": 3.0, "rejected_reward": 2.0, "margin": 1.0}
    examples, _, counted = labelled([record | own])
    assert [(e["prompt"], e["completion"], e["label"]) for e in examples] == [
        (OPENING, "Good.", True),
        (OPENING, "Bad.", False),
    ]
    assert [(e["completion_token_ids"], e["completion_reward"]) for e in examples] == [([1], 3.0), ([2], 2.0)]
    assert not {"chosen", "rejected", "margin", *own} & examples[0].keys() and counted["in"] == 2


def test_a_pair_of_identical_responses_says_nothing():
    examples, drops, _ = labelled([{"prompt": "Hello", "chosen": "Same.", "rejected": "Same."}])
    assert examples == [] and drops.counts == {"identical responses": 2}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hello", "completion": "Good.", "label": 2}, r"`label` must be true .* got 2"),
        ({"prompt": "Hello", "completion": "Good.", "label": "yes"}, r"`label` must be true .* got 'yes'"),
        ({"prompt": "Hello", "completion": "Good."}, r"`label` must be true .* got None"),
        ({"prompt": "Hello", "label": True}, "expected `prompt`, `completion` and `label`, or .* `prompt`, `label`"),
        ({"completion": "Good.", "label": True}, "no `prompt`"),
        ({"prompt": "Hello", "completion": " ", "label": True}, "`completion` must be a text or a message that is not empty"),
        ({"prompt": "Hello", "completion": [*OPENING, said("Good.")], "label": True}, "earlier turns belong in `prompt`"),
        ({"prompt": "Hello", "completion": OPENING, "label": True}, "must be one message of the assistant"),
        ({"prompt": "Hello", "responses": ["a"], "rewards": [float("nan")]}, "`rewards` holds nan"),
        ({"prompt": "Hello", "responses": ["a"]}, "annotate the file first"),
        ({"prompt": "Hello", "chosen": "Good."}, "no `rejected`"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(record, message):
    with pytest.raises(InputError, match=f"file:2: .*{message}"):
        labelled([{"prompt": "Hello", "completion": "Good.", "label": True}, record])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((1.0, None), "give both, or neither"),
        ((None, 1.0), "give both, or neither"),
        ((1.0, 2.0), r"`undesirable_below` \(2.0\) must not be above"),
        ((float("nan"), 0.0), "both finite"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(bounds, message):
    with pytest.raises(InputError, match=message):
        LabelSettings(*bounds)


@pytest.mark.parametrize("counts", [(3, 0), (0, 3), (0, 0)])
def test_one_kind_of_example_alone_is_refused_with_the_counts_and_the_drops(counts):
    drops = Drops()
    drops.add("some reason", "a")
    message = f"file: {counts[0]} desirable and {counts[1]} undesirable examples are left.*dropped: 1 some reason"
    with pytest.raises(InputError, match=message):
        check_both_kinds(*counts, "file", drops)
    check_both_kinds(1, 1, "file", drops)
