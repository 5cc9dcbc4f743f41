"""Preference pairs: the better response is chosen; every requested pair is kept or counted as dropped."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import pairs
from baton.drops import Drops
from baton.errors import InputError
from baton.pairs import PairSettings, candidates, checked_pair, choose_pair, edit_distance, far_apart, pairs_of, why_left_out
from dpo_iteration.choose import extra_responses

CHOOSE_TYPES = ("random", "max_random", "max_min", "max_max", "west_of_n", "sweet_spot", "max_min_p")

texts = st.text(alphabet="ab ", min_size=1, max_size=12)
score = st.integers(-8, 8).map(lambda eighths: eighths / 8)  # few values, so that ties are frequent


@st.composite
def annotated(draw, least=2):
    """An annotated record of 2 to 9 responses, some equal, some tied, some cut off by length."""
    K = draw(st.integers(least, 9))
    return {
        "id": draw(st.uuids()).hex,
        "prompt": [{"role": "user", "content": "Say something."}],
        "responses": [draw(texts) for _ in range(K)],
        "response_token_ids": [[i] for i in range(K)],
        "finish_reasons": [draw(st.sampled_from(["stop", "length"])) for _ in range(K)],
        "rewards": [draw(score) for _ in range(K)],
        "source": "a test",
    }


settings = st.builds(
    PairSettings,
    choose_type=st.sampled_from(CHOOSE_TYPES[:-1]),
    pairs_per_prompt=st.integers(1, 4),
    min_margin=st.sampled_from([0.0, 0.5]),
    max_length_ratio=st.sampled_from([None, 1.0, 2.5]),
    drop_truncated=st.booleans(),
    seed=st.integers(0, 3),
)


def made(records, settings):
    drops = Drops()
    return list(pairs_of([(f"file:{i}", record) for i, record in enumerate(records, 1)], settings, drops)), drops


def by_id_and_tokens(pair):
    return pair["id"], pair["chosen_token_ids"]


@given(st.lists(annotated(), max_size=6), settings)
def test_every_pair_that_is_asked_for_is_kept_or_dropped_with_a_reason(records, settings):
    kept, drops = made(records, settings)
    assert len(kept) + drops.counts.total() == sum(candidates(len(record["responses"]), settings) for record in records)


@given(annotated(), settings)
def test_kept_pairs_pass_every_filter_and_use_each_response_once(record, settings):
    kept, _ = made([record], settings)
    used = [index for pair in kept for index in pair["chosen_token_ids"] + pair["rejected_token_ids"]]
    assert len(used) == len(set(used))
    for pair in kept:
        assert pair["chosen"] != pair["rejected"]
        assert pair["margin"] == pair["chosen_reward"] - pair["rejected_reward"] > 0
        assert pair["margin"] >= settings.min_margin
        if settings.drop_truncated:
            assert "length" not in (pair["chosen_finish_reason"], pair["rejected_finish_reason"])
        if settings.max_length_ratio:
            lengths = sorted((len(pair["chosen"]), len(pair["rejected"])))
            assert lengths[1] <= settings.max_length_ratio * lengths[0]


@given(
    st.lists(annotated(), min_size=1, max_size=6, unique_by=lambda record: record["id"]),
    settings,
    st.randoms(),
)
def test_the_order_of_the_records_does_not_change_a_pair(records, settings, order):
    shuffled = records.copy()
    order.shuffle(shuffled)
    assert sorted(made(records, settings)[0], key=by_id_and_tokens) == sorted(made(shuffled, settings)[0], key=by_id_and_tokens)


@given(st.lists(score, min_size=2, max_size=9), st.sampled_from(CHOOSE_TYPES), st.integers(0, 9))
def test_chosen_never_scores_below_rejected(scores, choose_type, seed):
    chosen, rejected = choose_pair(scores, choose_type, random.Random(seed))
    assert chosen != rejected
    assert scores[chosen] >= scores[rejected]
    if choose_type != "random":
        assert scores[chosen] == max(scores)
    if choose_type in ("max_min", "max_min_p", "west_of_n"):
        assert scores[rejected] == min(scores)
    if choose_type == "max_max":
        assert scores[rejected] == sorted(scores)[-2]


def test_random_types_reach_every_other_response():
    scores = [0.1, 0.9, 0.4, 0.2]
    drawn = {choose_pair(scores, "max_random", random.Random(seed)) for seed in range(60)}
    assert drawn == {(1, 0), (1, 2), (1, 3)}
    assert len({choose_pair(scores, "random", random.Random(seed)) for seed in range(200)}) == 6


@given(st.lists(score, min_size=2, max_size=5))
def test_the_sweet_spot_of_few_responses_is_the_worst(scores):
    chosen, rejected = choose_pair(scores, "sweet_spot", random.Random(0))
    assert (chosen, scores[rejected]) == (choose_pair(scores, "max_min", random.Random(0))[0], min(scores))


def test_the_sweet_spot_leaves_out_outliers():
    scores = [1.0, *[0.1 * i for i in range(-7, 8)], -9.0]  # the goal is near -5
    assert choose_pair([*scores, -4.0], "sweet_spot", random.Random(0)) == (0, len(scores))


def by_table(first, second):
    """The edit distance by the usual table, row by row."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(st.text("abc", max_size=90), st.text("abcé", max_size=90))
def test_the_edit_distance_is_that_of_the_usual_table(first, second):
    assert edit_distance(first, second) == by_table(first, second)


@given(texts, texts, st.floats(0, 1))
def test_pairs_closer_than_the_least_distance_are_dropped(chosen, rejected, least):
    drops = Drops()
    kept = list(far_apart([{"id": "a", "chosen": chosen, "rejected": rejected}], least, drops))
    assert bool(kept) == (by_table(chosen, rejected) >= least * max(len(chosen), len(rejected)))
    assert len(kept) + drops.counts[pairs.TOO_CLOSE] == 1


def test_extra_responses_stand_beside_a_prompts_own():
    record = {
        "id": "a", "prompt": "Hello", "responses": ["own"], "rewards": [0.5],
        "response_token_ids": [[3]], "logps_by": {"policy": [1]},
    }  # fmt: skip
    extra = {"a": {"responses": ["best", "worst"], "rewards": [1.0, 0.0], "finish_reasons": ["stop", "length"]}}
    drops = Drops()
    (pair,) = pairs_of([("file:1", record)], PairSettings("max_max"), drops, extra)
    assert (pair["chosen"], pair["rejected"], pair["margin"]) == ("best", "own", 0.5)
    assert pair["chosen_finish_reason"] == "stop" and "rejected_finish_reason" not in pair
    assert pair["rejected_token_ids"] == [3] and "chosen_token_ids" not in pair and "logps_by" not in pair
    (pair,) = pairs_of([("file:1", record)], PairSettings(drop_truncated=True), drops, extra)
    assert (pair["chosen"], pair["rejected"]) == ("best", "own")
    with pytest.raises(InputError, match="file:1: a pair needs at least 2"):
        list(pairs_of([("file:1", record)], PairSettings(), drops, {"b": extra["a"]}))


def test_a_length_penalty_changes_which_response_is_best():
    record = {
        "id": "a",
        "prompt": "Hello",
        "responses": ["x" * 100, "yes", "no, never"],
        "rewards": [1.0, 0.9, 0.2],
    }
    (plain,), _ = made([record], PairSettings("max_min"))
    (penalised,), _ = made([record], PairSettings("max_min_p", len_penalty=0.01))
    assert (plain["chosen"], plain["rejected"]) == ("x" * 100, "no, never")
    assert (penalised["chosen"], penalised["rejected"]) == ("yes", "x" * 100)
    assert penalised["margin"] == pytest.approx((0.9 - 0.03) - (1.0 - 1.0))
    assert (penalised["chosen_reward"], penalised["rejected_reward"]) == (0.9, 1.0)


def test_other_keys_pass_through_and_per_response_keys_do_not():
    record = {
        "context_messages": "Hello",
        "responses": ["a", "b"],
        "rewards": [1, 2],
        "logps_by": {"policy": [1, 2]},
        "response_token_ids": [[3], [4]],
        "response_logps": [[-1.5], [-2.5]],
        "source": "x",
    }
    (pair,), _ = made([record], PairSettings())
    assert pair["source"] == "x"
    assert pair["prompt"] == [{"role": "user", "content": "Hello"}]
    assert not set(pairs.PER_RESPONSE_KEYS) & pair.keys()
    assert not any("logps" in name for name in pair)  # of the sampler: never the reference of a loss
    assert (pair["chosen_token_ids"], pair["rejected_token_ids"]) == ([4], [3])
    assert len(pair["id"]) == 16


def test_reasons_are_named():
    def reason(responses, rewards, **values):
        record = {
            "id": "a",
            "prompt": "Hello",
            "responses": responses,
            "rewards": rewards,
            "finish_reasons": ["length", "stop"],
        }
        _, drops = made([record], PairSettings(**values))
        return list(drops.counts)

    assert reason(["a", "a"], [1, 2]) == [pairs.IDENTICAL]
    assert reason(["a", "b"], [1, 1]) == [pairs.TIE]
    assert reason(["a", "b"], [1, 2], min_margin=2) == [pairs.SMALL_MARGIN]
    assert reason(["a", "bbbb"], [1, 2], max_length_ratio=3) == [pairs.UNEQUAL_LENGTHS]
    assert reason(["a", "b"], [1, 2], drop_truncated=True) == [pairs.TRUNCATED]
    assert reason(["a", "b"], [1, 2]) == []


@pytest.mark.parametrize(
    ("pair", "values", "reason"),
    [
        ({}, {}, None),
        ({}, {"min_margin": 1.0, "drop_truncated": True}, None),  # what a file does not say is no reason
        ({"margin": 0.5}, {}, None),
        ({"margin": 0.5}, {"min_margin": 1.0}, pairs.SMALL_MARGIN),
        ({"margin": -0.5}, {}, pairs.TIE),
        ({"rejected": "good"}, {}, pairs.IDENTICAL),
        ({"rejected": "b"}, {"max_length_ratio": 2}, pairs.UNEQUAL_LENGTHS),
        ({"rejected_finish_reason": "length"}, {"drop_truncated": True}, pairs.TRUNCATED),
    ],
)
def test_filters_also_act_on_pairs_that_a_file_gives(pair, values, reason):
    assert why_left_out({"chosen": "good", "rejected": "bad", **pair}, PairSettings(**values)) == reason


def test_a_margin_is_what_the_file_says_or_what_its_rewards_say():
    assert checked_pair({"chosen_reward": 1.5, "rejected_reward": 1}, "here")["margin"] == 0.5
    assert checked_pair({"chosen_reward": 1.5, "rejected_reward": 1, "margin": 2}, "here")["margin"] == 2
    assert "margin" not in checked_pair({"chosen_reward": 1.5}, "here")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("margin", float("nan")),
        ("chosen_reward", float("inf")),
        ("rejected_reward", "high"),
        ("chosen_token_ids", [5, 6.0]),
        ("chosen_token_ids", ["5"]),
        ("rejected_token_ids", [5, -1]),
        ("rejected_token_ids", [[5]]),
        ("rejected_token_ids", 5),
        ("rejected_token_ids", [2**64]),
    ],
)
def test_a_bad_number_in_a_pair_is_named(field, value):
    with pytest.raises(InputError, match=f"file:1: `{field}`"):
        checked_pair({"chosen": "a", "rejected": "b", field: value}, "file:1")


@pytest.mark.parametrize("choose_type", CHOOSE_TYPES)
def test_one_response_is_an_error_that_names_the_line(choose_type):
    with pytest.raises(InputError, match="file:1: a pair needs at least 2"):
        made([{"prompt": "Hello", "responses": ["a"], "rewards": [1]}], PairSettings(choose_type))


def test_rewards_and_responses_of_different_length_are_an_error():
    with pytest.raises(InputError, match="file:1: 3 `rewards` for 2 `responses`"):
        made([{"prompt": "Hello", "responses": ["a", "b"], "rewards": [1, 2, 3]}], PairSettings())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choose_type": "max_mim"}, "max_mim"),
        ({"choose_type": "max_min", "len_penalty": 0.1}, "max_min_p only"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt"),
        ({"min_margin": float("nan")}, "min_margin"),
        ({"max_length_ratio": 0.5}, "max_length_ratio"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        PairSettings(**values)


def test_extra_responses_to_another_prompt_under_the_same_id_are_refused(tmp_path):
    record = {"id": "1", "prompt": "Hello", "responses": ["a", "b"], "rewards": [1.0, 0.0]}
    path = tmp_path / "extra.jsonl"
    path.write_text(json.dumps({**record, "prompt": "Goodbye", "responses": ["c", "d"]}) + "\n")
    with pytest.raises(InputError, match="file:1: `extra_responses` has another prompt under this `id`"):
        list(pairs_of([("file:1", record)], PairSettings(), Drops(), extra_responses(str(path), "train")))
