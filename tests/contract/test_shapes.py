"""Every shape of data that other toolkits write becomes the same record, and what cannot be understood is named."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.conversations import as_messages, hh_turns
from baton.data.reading import Tally
from baton.demonstrations import demonstration_of
from baton.drops import Drops
from baton.errors import InputError
from baton.keys import with_usual_keys
from baton.labels import LabelSettings, labelled_examples
from baton.pairs import PairSettings
from baton.preferences import preference_records
from baton.prompts import PromptSet
from baton.records import prompt_of
from baton.scored import with_rows_merged
from baton.shapes import baton_records, parts_of, shape_of
from dpo_iteration import example_rows, pair_rows, run_dpo, run_kto
from dpo_iteration.choose import choose_pairs
from reward_model import run_rm
from reward_model.pairs import all_pairs
from sft import run_sft
from tests.programs import write_jsonl


def user(content):
    return {"role": "user", "content": content}


def said(content):
    return {"role": "assistant", "content": content}


def turn(speaker, value, key="value"):
    return {"from": speaker, key: value}


OPENING = [user("Hello")]
DEEP = [user("Hello"), said("Hi."), user("And?")]
SAYS = ["Hello", "Hi.", "And?", "Yes."]
HH = "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: And?\n\nAssistant:"


def converted(records, kind=None, **settings):
    """What records become, of the kind that the first looks like, and what was left out."""
    tally, found = Tally(), []
    kind = kind or shape_of(records[0], settings.get("score")).kind
    numbered = [(f"file:{i}", record) for i, record in enumerate(records, 1)]
    units = with_rows_merged(numbered, settings.get("score")) if kind in ("preferences", "labelled") else numbered
    for where, record in units:
        found += baton_records(record, where, kind, tally, **settings)
    return found, kind, tally


PROMPTS = [
    ({"prompt": "Hello"}, OPENING),
    ({"prompt": HH}, DEEP),
    ({"context_messages": DEEP}, DEEP),
    ({"messages": [user("Hello")]}, OPENING),
    ({"messages": [user([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}])]}, OPENING),
    ({"messages": [turn("user", "Hello", "content")]}, OPENING),
    ({"conversations": [turn("human", "Hello"), turn("gpt", "Hi."), turn("human", "And?")]}, DEEP),
    ({"conversations": [turn("human", "Hello")], "system": "Be kind."}, [{"role": "system", "content": "Be kind."}, *OPENING]),
    ({"instruction": "Hello"}, OPENING),
    ({"instruction": "Say it:", "input": "Hello"}, [user("Say it:\nHello")]),
    ({"instruction": "And?", "input": "", "history": [["Hello", "Hi."]]}, DEEP),
    ({"instruction": "Say it:", "context": "Hello"}, [user("Say it:\nHello")]),
]


@pytest.mark.parametrize(("record", "messages"), PROMPTS)
def test_a_prompt_of_every_shape_is_read_and_other_keys_stay(record, messages):
    (found,), kind, _ = converted([record | {"source": "a test"}])
    assert (found, kind) == ({"prompt": messages, "source": "a test"}, "prompts")
    assert prompt_of(record, "here") == messages


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [*DEEP, said("Yes.")]},
        {"conversations": [turn("human", "Hello"), turn("gpt", "Hi."), turn("human", "And?"), turn("gpt", "Yes.")]},
        {"prompt": HH + " Yes."},
        {"chosen": HH + " Yes.", "rejected": HH + " No."},
        {"chosen": [*DEEP, said("Yes.")], "rejected": [*DEEP, said("No.")]},
        {"prompt": [*DEEP, said("Yes.")]},
    ],
)
def test_a_prompt_that_ends_with_the_assistant_loses_that_turn_and_is_counted(record, tmp_path):
    prompts = PromptSet(str(write_jsonl(tmp_path / "p.jsonl", [record, {"prompt": "Hello"}])))
    assert [messages for _, _, _, messages in prompts.shard(0, 1)] == [DEEP, OPENING]
    assert prompts.answered == ("chosen" not in record)
    assert converted([record], "prompts")[0][0]["prompt"] == DEEP


DEMONSTRATIONS = [
    {"messages": [*DEEP, said("Yes.")]},
    {"conversations": [turn("human", "Hello"), turn("assistant", "Hi."), turn("Human", "And?"), turn("GPT", "Yes.")]},
    {"messages": [turn(who, what, "content") for who, what in zip(["user", "bot"] * 2, SAYS, strict=True)]},
    {"messages": DEEP, "response": "Yes."},
    {"prompt": DEEP, "response": "Yes."},
    {"prompt": DEEP, "completion": [said("Yes.")]},
    {"prompt": HH, "answer": "Yes."},
    {"instruction": "And?", "input": "", "output": "Yes.", "history": [["Hello", "Hi."]]},
    {"prompt": [*DEEP, said("Yes.")]},
    {"response": HH + " Yes.", "rejected": HH + " No."},
]


@pytest.mark.parametrize("record", DEMONSTRATIONS)
def test_a_demonstration_of_every_shape_becomes_a_conversation(record):
    (found,), *_ = converted([record | {"source": "a test"}], "demonstrations")
    assert found.pop("rejected", None) == record.get("rejected")  # a key that was not read
    assert found == {"messages": [*DEEP, said("Yes.")], "source": "a test"}


def test_a_plain_text_stays_a_text():
    assert converted([{"text": "It opens at sea.", "n": 1}])[:2] == ([{"text": "It opens at sea.", "n": 1}], "demonstrations")


def test_a_plain_text_of_colossalchat_is_a_text_too():
    record = {"source": "", "Target": "It opens at sea.", "n": 1}
    assert converted([record])[:2] == ([{"text": "It opens at sea.", "n": 1}], "demonstrations")
    assert demonstration_of(record, "here") == "It opens at sea."
    with pytest.raises(InputError, match="`Target` is empty"):
        demonstration_of(record | {"Target": " "}, "here")


PAIRS = [
    {"prompt": DEEP, "chosen": "Yes.", "rejected": "No."},
    {"prompt": HH, "chosen": "Yes.", "rejected": "No."},
    {"chosen": HH + " Yes.", "rejected": HH + " No."},
    {"chosen": [*DEEP, said("Yes.")], "rejected": [*DEEP, said("No.")]},
    {
        "context": [turn(who, what, "content") for who, what in zip(["user", "bot", "user"], SAYS[:3], strict=True)],
        "chosen": [turn("assistant", "Yes.", "content")],
        "rejected": [turn("assistant", "No.", "content")],
    },
    {
        "conversations": [turn("human", "Hello"), turn("gpt", "Hi."), turn("human", "And?")],
        "chosen": turn("gpt", "Yes."),
        "rejected": turn("gpt", "No."),
    },
    {"instruction": "And?", "history": [["Hello", "Hi."]], "chosen": "Yes.", "rejected": "No."},
    {"prompt": DEEP, "pos_answers": ["Yes."], "neg_answers": ["No."]},
    {"prompt": DEEP, "completions": [{"response": "No.", "overall_score": 1}, {"response": "Yes.", "overall_score": 7.5}]},
]


@pytest.mark.parametrize("record", PAIRS)
def test_a_preference_of_every_shape_becomes_the_same_pair_in_every_program(record):
    (found,), kind, _ = converted([record | {"source": "a test"}])
    rewards = {"chosen_reward": 7.5, "rejected_reward": 1, "margin": 6.5} if "completions" in record else {}
    pair = {"prompt": DEEP, "chosen": "Yes.", "rejected": "No.", "source": "a test", **rewards}
    assert (found, kind) == (pair, "preferences")
    ((_, of_reward_model),) = preference_records([("here", record)])
    (of_dpo,) = choose_pairs([("here", record)], PairSettings(), Drops(), Counter())
    examples = list(labelled_examples([("here", record)], LabelSettings(), Drops(), Counter()))
    for read in (of_reward_model, of_dpo):
        assert {name: read[name] for name in ("prompt", "chosen", "rejected")} == {name: pair[name] for name in list(pair)[:3]}
    assert {(e["completion"], e["label"]) for e in examples} == {("Yes.", True), ("No.", False)}
    assert all(e["prompt"] == DEEP for e in examples)


SHAPES = {"prompts": [record for record, _ in PROMPTS], "demonstrations": DEMONSTRATIONS, "preferences": PAIRS}


@pytest.mark.parametrize(("kind", "record"), [(kind, record) for kind, records in SHAPES.items() for record in records])
def test_a_system_text_beside_a_prompt_is_its_system_message_in_every_shape(kind, record):
    key = "messages" if kind == "demonstrations" else "prompt"
    ((without,), *_), ((found,), *_) = (converted([record | {"system": text}], kind) for text in (" ", "Be brief."))
    without.pop("system", None)  # a key that was not read, or that says nothing
    assert found == without | {key: [{"role": "system", "content": "Be brief."}, *without[key]]}
    if kind == "preferences":
        programs = (
            [pair for _, pair in preference_records([("here", record | {"system": "Be brief."})])],
            list(choose_pairs([("here", record | {"system": "Be brief."})], PairSettings(), Drops(), Counter())),
            list(labelled_examples([("here", record | {"system": "Be brief."})], LabelSettings(), Drops(), Counter())),
        )
        assert all(read["prompt"] == found["prompt"] for program in programs for read in program)


ROWS = [
    {"prompt": "Hello", "response": "Yes.", "helpfulness": 4, "verbosity": 1, "id": "a"},
    {"prompt": "Hello", "response": "No.", "helpfulness": 1, "verbosity": 2, "id": "b"},
    {"prompt": "Alone", "response": "Yes.", "helpfulness": 4, "verbosity": 2, "id": "c"},
    {"prompt": "Tied", "response": "Yes.", "helpfulness": 2, "verbosity": 3, "id": "d"},
    {"prompt": "Tied", "response": "No.", "helpfulness": 2, "verbosity": 4, "id": "e"},
]


def test_rows_of_one_prompt_with_scores_become_a_pair_with_its_margin():
    found, kind, tally = converted(ROWS)
    pair = {"id": "a", "prompt": OPENING, "chosen": "Yes.", "rejected": "No.", "verbosity": [1, 2]}
    assert (found, kind) == ([pair | {"chosen_reward": 4, "rejected_reward": 1, "margin": 3}], "preferences")
    assert tally.counts == {"fewer than two scored responses": 1, "tied rewards": 1}
    ((pair, *_), _, _) = converted(ROWS, score="verbosity")
    assert (pair["chosen"], pair["margin"]) == ("No.", 1)


def test_dpo_counts_prompts_with_one_scored_response_and_refuses_a_file_of_one_response_each():
    drops, counted = Drops(), Counter()
    pairs = list(choose_pairs([(f"file:{i}", row) for i, row in enumerate(ROWS)], PairSettings(), drops, counted))
    assert counted["in"] == len(pairs) + drops.counts.total() == 3
    own = {"prompt": "Hello", "responses": ["Yes."], "rewards": [1.0]}
    with pytest.raises(InputError, match="needs at least 2"):
        list(choose_pairs([("file:1", own)], PairSettings(), drops, counted))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3)), max_size=12), st.integers(1, 3))
def test_every_scored_row_is_in_one_unit_and_pairs_have_positive_margins(rows, most):
    records = [{"prompt": prompt, "response": f"{i}", "score": score} for i, (prompt, score) in enumerate(rows)]
    merged = list(with_rows_merged((f"file:{i}", record) for i, record in enumerate(copy.deepcopy(records))))
    assert [c["response"] for _, record in merged for c in record["completions"]] == [r["response"] for r in records]
    assert all(a["prompt"] != b["prompt"] for (_, a), (_, b) in pairwise(merged))
    for _, pair in preference_records([("here", record) for record in records], most):
        assert pair["margin"] == pair["chosen_reward"] - pair["rejected_reward"] > 0


@given(st.integers(1, 5), st.none() | st.integers(1, 6))
def test_answers_are_paired_in_their_order_up_to_the_most_for_a_prompt(count, most):
    answers = {name: [f"{name} {i}" for i in range(count)] for name in ("pos_answers", "neg_answers")}
    found, *_ = converted([{"prompt": "Hello", **answers}], max_pairs_per_prompt=most)
    assert [(p["chosen"], p["rejected"]) for p in found] == list(zip(*answers.values(), strict=True))[:most]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": DEEP, "completion": "Yes.", "label": 1},
        {"prompt": HH, "completion": "Yes.", "label": "True"},
        {"messages": [*DEEP, said("Yes.")], "label": True},
        {
            "conversations": [turn("human", "Hello"), turn("gpt", "Hi."), turn("human", "And?"), turn("gpt", "Yes.")],
            "label": 1.0,
        },
        {"instruction": "And?", "history": [["Hello", "Hi."]], "output": "Yes.", "label": True},
    ],
)
def test_a_labelled_response_of_every_shape_becomes_the_same_record(record):
    assert converted([record])[:2] == ([{"prompt": DEEP, "completion": "Yes.", "label": True}], "labelled")


def test_steps_with_labels_are_a_kind_of_their_own():
    record = {"prompt": "Hello", "completions": ["One.\n", "Two."], "labels": [True, 0], "kept": 1}
    wanted = {"prompt": OPENING, "completions": ["One.", "Two."], "labels": [True, False], "kept": 1}
    assert converted([record])[:2] == ([wanted], "stepwise") == converted([wanted])[:2]
    assert parts_of(wanted, "stepwise") == (OPENING, ("One.\n\nTwo.",))


PLAIN = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=8)


@given(st.lists(PLAIN, min_size=2, max_size=6))
def test_every_way_to_write_a_conversation_reads_the_same(texts):
    wanted = [(user, said)[i % 2](text) for i, text in enumerate(texts)]
    for names in (("human", "gpt"), ("user", "assistant")):
        for key in ("value", "content"):
            assert as_messages([turn(names[i % 2], text, key) for i, text in enumerate(texts)], "here", "x") == wanted
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in wanted]
    assert as_messages(parts, "here", "x") == wanted
    assert hh_turns("".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))) == wanted


@given(st.sampled_from(PAIRS + DEMONSTRATIONS[:8] + [record for record, _ in PROMPTS]))
def test_what_was_converted_is_read_as_it_is(record):
    once, kind, _ = converted([copy.deepcopy(record)])
    assert converted(copy.deepcopy(once))[:2] == (once, kind)


KEYS = "prompt messages conversations instruction input output chosen rejected completions label labels text".split()
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "from", "value", "content", "response"]), st.text(max_size=4)))
VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.none() | st.text(max_size=2)) | MESSAGES


@given(
    st.sampled_from(["prompts", "demonstrations", "preferences", "labelled", "stepwise"]),
    st.dictionaries(st.sampled_from(KEYS), VALUES),
)
def test_whatever_a_record_holds_it_is_read_or_refused_by_its_place(kind, record):
    shape_of(record)
    try:
        found, *_ = converted([record], kind)
    except InputError as error:
        assert str(error).startswith("file:1: ")
    else:
        assert all(isinstance(each.get("prompt", each.get("messages", each.get("text"))), list | str) for each in found)


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"conversations": [turn("narrator", "x")]}, "prompts", "`from` must be one of user, human, .*; got 'narrator'"),
        ({"conversations": [{"value": "x"}]}, "prompts", "a message needs `role` and `content` .or `from` and `value`."),
        ({"conversations": ["x"]}, "prompts", "a message needs `role`"),
        ({"messages": [user([{"type": "image_url", "image_url": "x"}])]}, "prompts", "must hold texts alone"),
        ({"messages": [said("Hi.")]}, "prompts", "a prompt needs a turn of the user"),
        ({"instruction": " "}, "prompts", "`instruction` is empty"),
        ({"instruction": "x", "input": 5}, "prompts", "`input` must be a text, got 5"),
        ({"instruction": "x", "history": ["y"]}, "prompts", "`history` must hold pairs of texts"),
        ({"question": "x"}, "prompts", "no `prompt` or `context_messages`, it has `question`; .* --dataset_key"),
        ({"messages": OPENING}, "demonstrations", "`messages` must end with the assistant, this ends with 'user'"),
        ({"prompt": "Hello"}, "demonstrations", "needs `messages`, or a prompt and its response .*--output_key"),
        ({"prompt": "Hello", "response": " "}, "demonstrations", "`response` must be a text that is not empty"),
        ({"prompt": "Hello", "completion": "x", "label": False}, "demonstrations", "may be one to avoid"),
        ({"text": " "}, "demonstrations", "`text` is empty"),
        ({"prompt": "x", "pos_answers": ["a"]}, "preferences", "`neg_answers` must be a list"),
        ({"prompt": "x", "pos_answers": ["a", "b"], "neg_answers": ["c"]}, "preferences", "2 `pos_answers` for 1"),
        ({"prompt": "x", "completions": [{"response": "a"}] * 2}, "preferences", "number 1 has no score .*--score_key"),
        ({"prompt": "x", "completions": [{"response": "a", "score": "N/A"}] * 2}, "preferences", "not a finite number"),
        ({"prompt": "x", "completions": [{"response": 1, "score": 1}] * 2}, "preferences", "`response` must be a text"),
        ({"chosen": HH + " Yes.", "rejected": "\n\nHuman: x\n\nAssistant: y"}, "preferences", "the same conversation"),
        ({"messages": OPENING, "label": True}, "labelled", "must end with the response of the assistant that `label`"),
        ({"prompt": "x", "completions": ["y"], "labels": ["good"]}, "stepwise", "`labels` must be a list of true or false"),
        ({"completions": ["y"], "labels": [True]}, "stepwise", "no `prompt` or `context_messages`"),
        ({"prompt": "x", "completion": "y", "label": "good"}, "labelled", "`label` must be true .*got 'good'.*--label_key"),
    ],
)
def test_what_cannot_be_understood_is_named_with_its_place_and_field(record, kind, message):
    with pytest.raises(InputError, match=f"^file:1: .*{message}"):
        converted([record], kind)


def test_fields_have_the_names_that_flags_give():
    record = {"q": "Hello", "good": "Yes.", "bad": "No.", "kept": 1}
    keys = {"prompt": "q", "chosen": "good", "rejected": "bad", "label": None}
    ((_, found),) = with_usual_keys([("file:1", record)], keys)
    assert found == {"prompt": "Hello", "chosen": "Yes.", "rejected": "No.", "kept": 1}
    with pytest.raises(InputError, match=r"file:1: the record has no `best` \(--chosen_key\), it has `q`, `good`"):
        list(with_usual_keys([("file:1", record)], {"chosen": "best"}))


def test_training_programs_take_several_files_with_rates_and_names_of_fields(tmp_path):
    files = [
        str(
            write_jsonl(
                tmp_path / f"{name}.jsonl", [{"q": f"{name} {i}", "good": "Yes.", "bad": "No.", "ok": 1} for i in range(9)]
            )
        )
        for name in "ab"
    ]
    given = {"model_name_or_path": "", "output_dir": "", "dataset_name_or_path": ",".join(files), "dataset_key": "q"}
    given |= {"dataset_probs": "0.7,0.3", "max_samples": 6}
    sides = {"chosen_key": "good", "rejected_key": "bad"}
    pairs = [pair for _, pair in all_pairs(run_rm.Arguments(**given, **sides))]
    kto = run_kto.Arguments(**given, output_key="good", label_key="ok")
    examples = list(labelled_examples(example_rows.records_of(kto), LabelSettings(), Drops(), Counter()))
    shown = [each.messages for each in run_sft.demonstrations(run_sft.Arguments(**given, output_key="good"))]
    dpo = run_dpo.Arguments(**{name: value for name, value in given.items() if name != "max_samples"}, **sides)
    every = [record["prompt"] for _, record in pair_rows.records_of(dpo)]
    prompts = [pair["prompt"][0]["content"] for pair in pairs]
    assert len(prompts) == 6 and {prompt[0] for prompt in prompts} == {"a", "b"}
    assert [e["prompt"][0]["content"] for e in examples] == [m[0]["content"] for m in shown] == prompts
    assert set(prompts) <= set(every)
    assert (pairs[0]["chosen"], examples[0]["completion"], shown[0][-1]["content"]) == ("Yes.",) * 3


def test_what_a_policy_sampled_is_taken_as_it_stands_though_it_looks_like_turns():
    text = "\n\nHuman: Hello\n\nAssistant: Yes."
    pair = {"id": "a", "prompt": OPENING, "chosen": text, "rejected": "", "margin": 1.0}
    assert converted([pair])[0] == [pair]
    assert converted([{"prompt": OPENING, "response": text}])[0] == [{"messages": [*OPENING, said(text)]}]


@pytest.mark.parametrize("shape", [PAIRS[-1], PAIRS[-2], ROWS[0]], ids=["UltraFeedback", "ReaL", "HelpSteer"])
def test_what_the_policy_sampled_counts_whatever_columns_the_prompts_brought_along(shape):
    sampled = {"prompt": DEEP, "id": "1", "responses": ["Mine.", "Bad."], "rewards": [1.0, 0.0]}
    ids = {"response_token_ids": [[1], [2]], "finish_reasons": ["stop", "stop"]}
    record = {**shape, **sampled, **ids}
    ((pair),) = choose_pairs([("here", record)], PairSettings(), Drops(), Counter())
    assert (pair["chosen"], pair["rejected"], pair["chosen_token_ids"]) == ("Mine.", "Bad.", [1])
    ((_, of_reward_model),) = preference_records([("here", record)])
    assert (of_reward_model["chosen"], of_reward_model["rejected"]) == ("Mine.", "Bad.")
    examples = list(labelled_examples([("here", record)], LabelSettings(), Drops(), Counter()))
    assert {(e["completion"], e["label"]) for e in examples} == {("Mine.", True), ("Bad.", False)}
    (again,) = choose_pairs([("here", pair)], PairSettings(), Drops(), Counter())
    assert (again["chosen"], again["chosen_token_ids"]) == ("Mine.", [1])


def test_turns_after_a_prompt_of_their_own_keep_it():
    first = [{"role": "user", "content": "Hello"}]
    turns = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "And?"}]
    sides = {side: [*turns, {"role": "assistant", "content": text}] for side, text in (("chosen", "Yes."), ("rejected", "No."))}
    ((_, pair),) = preference_records([("here", {"prompt": first, **sides})])
    assert pair["prompt"] == [*first, *turns]
    with pytest.raises(InputError, match="here: `chosen` begins with the assistant"):
        list(preference_records([("here", sides)]))
