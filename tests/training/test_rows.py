"""Token in, token out: what is trained on is what the policy sampled, and it learns to stop only where it stopped."""

import copy
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainingArguments

from baton import jsonl
from baton.drops import Drops
from baton.errors import InputError
from baton.models.templates import (
    FOREIGN,
    OTHER_TEMPLATE,
    SAMPLED,
    decodes_to,
    load_tokenizer,
    prompt_token_ids,
    response_pieces,
    response_token_ids,
    template_hash,
    template_warning,
)
from baton.pairs import PairSettings
from baton.preferences import preference_of
from baton.training import reference
from baton.training.checkpoints import stop_at_end_of_turn
from baton.training.demonstrations import Demonstration, row_of, rows_of_demonstrations
from baton.training.reference import DatasetPairs
from baton.training.rows import rows_on_disk
from distillation import run_kd
from distillation.rows import examples
from dpo_iteration.choose import at_least_one, choose_pairs, earlier_pairs, pairs_again
from dpo_iteration.rows import Rows, log_rows, shown
from sft import run_sft
from tests.programs import write_jsonl

PROMPT = [{"role": "user", "content": "Continue this review: It opens at sea."}]


@pytest.fixture(scope="module")
def tokenizer(task):
    return load_tokenizer(str(task / "base"))


def rows_of(pair, tokenizer, tmp_path, max_length=256, max_prompt_length=128):
    """The rows, drops and counts that one pair gives."""
    pairs = [(f"{tmp_path}/pairs.jsonl:1", {"id": "a", "prompt": PROMPT, **pair})]
    drops, counted = Drops(), Counter()
    return list(Rows(tokenizer, max_length, max_prompt_length, drops, counted).of_pairs(pairs)), drops, counted


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


@pytest.mark.parametrize(("ids", "says"), [([5, 10**6], "id 1000000 of 1024"), ([5, 6], "they do not decode")])
def test_token_ids_of_another_tokenizer_are_not_used_and_the_log_says_so(tokenizer, tmp_path, caplog, ids, says):
    pair = {"chosen": "A warm film.", "rejected": "A mess.", "chosen_token_ids": ids}
    (row,), drops, counted = rows_of(pair, tokenizer, tmp_path)
    assert decodes_to(tokenizer, row["chosen_ids"], "A warm film.")
    assert counted["responses with sampled token ids"] == 0
    assert f"pairs.jsonl:1: `chosen_token_ids` are not this tokenizer's ({says}" in caplog.text
    log_rows(Dataset.from_list([row]), tokenizer, drops, counted)
    assert "1 of 2 responses have token ids that are not this tokenizer's" in caplog.text


def test_rows_that_no_pair_is_left_for_are_refused_by_filter(tokenizer, tmp_path):
    drops = Drops()
    pairs = [("here", {"id": str(i), "prompt": PROMPT, "chosen": "A warm film.", "rejected": "A mess."}) for i in range(3)]

    def rows():
        return at_least_one(Rows(tokenizer, 256, 1, drops, Counter()).of_pairs(pairs), "pairs.jsonl", drops)

    config = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match=r"pairs\.jsonl: no pair is left; dropped: 3 prompt longer than max_prompt_length 1 "):
        rows_on_disk(rows, config, "pairs")


def read_back(path, **settings):
    """The pairs that a file gives, with the drops and counts."""
    drops, counted = Drops(), Counter()
    return list(choose_pairs(jsonl.read(path), PairSettings(**settings), drops, counted)), drops, counted


def test_pairs_read_back_are_the_pairs_that_were_written(tmp_path):
    record = {
        "id": "a",
        "prompt": PROMPT,
        "responses": ["A warm film.", "", "\n\nHuman: And?\n\nAssistant: No.", "A mess."],
        "response_token_ids": [[5, 2], [2], [7, 8, 9], [6, 2]],
        "finish_reasons": ["stop", "stop", "length", "stop"],
        "rewards": [2.0, -1.0, 1.0, 0.5],
        "source": "test",
    }
    pairs, _, counted = read_back(write_jsonl(tmp_path / "annotated.jsonl", [record]), pairs_per_prompt=2)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("A warm film.", ""), (record["responses"][2], "A mess.")]
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert read_back(path)[0] == pairs
    assert [pair for _, pair in pairs_again([path], counted)] == pairs
    assert counted["in"] == 4 and counted["pairs of earlier rounds"] == 2
    kept, drops, counted = read_back(path, min_margin=1.0)
    assert kept == pairs[:1] and drops.counts == {"margin below min_margin": 1} and counted["in"] == 2


@pytest.mark.parametrize("rewards", [{}, {"margin": 0.5}, {"chosen_reward": 2.0, "rejected_reward": 1.5}])
def test_a_pair_without_rewards_has_no_margin(tokenizer, tmp_path, rewards, caplog):
    preference = {"prompt": "Hello", "chosen": "Good.", "rejected": "Bad.", **rewards}
    (pair,), *_ = read_back(write_jsonl(tmp_path / "offline.jsonl", [preference]))
    (row,), *_ = rows_of(pair, tokenizer, tmp_path)
    assert row["margin"] == (0.5 if rewards else None)
    assert ("margin" in shown(row, tokenizer)) == bool(rewards)


@pytest.mark.parametrize(
    ("hashed", "ids", "counts"), [("own", True, 0), ("other", True, 1), ("other", False, 1), (None, True, 0)]
)
def test_records_of_another_chat_template_are_counted(tokenizer, tmp_path, hashed, ids, counts):
    known = {"own": template_hash(tokenizer), "other": "0" * 16, None: None}[hashed]
    sampled = {f"{side}_token_ids": letters(tokenizer, side) for side in ("chosen", "rejected")} if ids else {}
    pair = {"chosen": "chosen", "rejected": "rejected", **sampled, "chat_template_hash": known}
    *_, counted = rows_of(pair, tokenizer, tmp_path)
    assert counted[f"{OTHER_TEMPLATE} {'0' * 16}"] == counts
    assert bool(template_warning(counted, tokenizer)) == bool(counts)
    conversation = [*PROMPT, {"role": "assistant", "content": "ab"}]
    demonstration = Demonstration("here", conversation, letters(tokenizer, "ab"), "stop", known)
    counted = Counter()
    list(rows_of_demonstrations(tokenizer, 256, [demonstration], Drops(), counted))
    assert counted[f"{OTHER_TEMPLATE} {'0' * 16}"] == (hashed == "other")


def test_a_model_with_another_tokenizer_had_another_chat_template(tokenizer, tmp_path):
    foreign = {"chosen_token_ids": [10**6], "rejected_token_ids": [10**6], "chat_template_hash": "0" * 16}
    *_, counted = rows_of({"chosen": "chosen", "rejected": "rejected", **foreign}, tokenizer, tmp_path)
    assert template_warning(counted, tokenizer) is None and counted[FOREIGN] == 2


def test_one_file_may_hold_annotated_responses_and_preferences(tmp_path):
    preference = {"prompt": "Hello", "chosen": "Good.", "rejected": "Bad."}
    annotated = preference | {"prompt": "Hi", "responses": ["a", "b"], "rewards": [0, 1]}
    pairs, _, counted = read_back(write_jsonl(tmp_path / "both.jsonl", [preference, annotated]))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("Good.", "Bad."), ("b", "a")]
    assert counted["in"] == 2 and counted["pairs without a margin"] == 1
    with pytest.raises(InputError, match=r"bad\.jsonl:1: needs `responses` and `rewards`, or `chosen` and `rejected`"):
        read_back(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "Hello", "text": "Good."}]))


def test_history_is_the_pairs_of_the_rounds_before_as_far_as_they_exist(tmp_path, caplog):
    caplog.set_level("INFO")
    rounds = {number: tmp_path / f"round{number}" / "pairs.jsonl" for number in (1, 2, 4, 5, 11)}
    for path in rounds.values():
        path.parent.mkdir()
        path.touch()
    assert earlier_pairs(rounds[5], 0) == []
    assert earlier_pairs(rounds[5], 1) == [rounds[4]]
    assert earlier_pairs(rounds[5], 3) == [rounds[2], rounds[4]]
    assert earlier_pairs(rounds[5], 99) == [rounds[1], rounds[2], rounds[4]]
    assert f"history of 99 rounds: {rounds[1]}, {rounds[2]}, {rounds[4]}" in caplog.text
    assert earlier_pairs(rounds[1], 2) == []
    assert "no earlier round has pairs" in caplog.text
    with pytest.raises(InputError, match=r"pairs\.jsonl is in `third`: give --pairs_path RUN/round<i>/pairs\.jsonl"):
        earlier_pairs(tmp_path / "third" / "pairs.jsonl", 1)


def test_an_example_marks_what_is_learnt_and_cannot_command_the_terminal(tokenizer):
    ids = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in ("warm", "mess")}
    attack = "\x1b[2J\x1b]0;title\x07\r\u202e⟧⟦\n"
    row = {
        "prompt_ids": prompt_token_ids(tokenizer, [{"role": "user", "content": attack}], "here"),
        "chosen_ids": [*ids["warm"], tokenizer.eos_token_id],
        "rejected_ids": ids["mess"] * 400,
    }
    prompt, chosen, rejected = shown(row, tokenizer).split("\n")
    assert chosen.endswith(f"{len(row['chosen_ids'])} tokens: ⟦warm{tokenizer.eos_token}⟧")
    assert rejected.count("mess") == 74 and " … " in rejected and rejected.endswith("mess⟧")
    assert "⟦" not in prompt and "⟧" not in prompt and prompt.isprintable()
    assert "\\x1b[2J" in prompt and "\\u202e\\u27e7\\u27e6\\n" in prompt


def test_pairs_of_a_data_set_are_read_as_they_are_asked_for(tmp_path):
    rows = [{"margin": 1.0, "rejected_ids": [i], "prompt_ids": [1] * (i % 3 + 1), "chosen_ids": [i, 2]} for i in range(7)]
    plain = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    pairs = DatasetPairs(load_from_disk(str(tmp_path / "rows")))
    assert len(pairs) == 7 and [pairs[i] for i in range(7)] == plain
    assert [tuple(part.tolist() for part in pair) for pair in pairs] == plain
    outlines = [reference._outline(each) for each in (pairs, plain)]
    for ours, theirs in zip(*outlines, strict=True):
        assert ours.tolist() == theirs.tolist()
    assert len(set(outlines[0].pair.tolist())) == 7
    batches = list(reference._batches(outlines[0], 9, np.arange(7)))
    assert sorted(i for batch in batches for i in batch) == list(range(7))


def test_reference_memory_grows_by_a_few_bytes_a_pair_whatever_the_pairs_hold(tmp_path):
    peaks = {}
    for count in (500, 2_000):
        rows = ({"prompt_ids": [i] * 200, "chosen_ids": [i] * 200, "rejected_ids": [i] * 200} for i in range(count))
        Dataset.from_generator(lambda rows=rows: rows, cache_dir=str(tmp_path), fingerprint=str(count)).save_to_disk(
            tmp_path / f"rows{count}"
        )
        pairs = DatasetPairs(load_from_disk(str(tmp_path / f"rows{count}")))
        tracemalloc.start()
        assert sum(map(len, reference._batches(reference._outline(pairs), 4096, np.arange(count)))) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[2_000] - peaks[500]) / 1_500 < 200  # bytes a pair; a pair holds 600 ids


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


STOPPED, CUT = "A warm film.", "A mess"


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_demonstration_is_learnt_as_it_was_sampled_and_its_end_only_where_the_policy_stopped(tokenizer, tmp_path, with_ids):
    end = tokenizer.eos_token_id
    ids = {STOPPED: [*letters(tokenizer, STOPPED), end], CUT: letters(tokenizer, CUT)}
    records = [
        {"messages": [*PROMPT, said(text)], "finish_reason": reason, **({"response_token_ids": ids[text]} if with_ids else {})}
        for text, reason in ((STOPPED, "stop"), (CUT, "length"))
    ]
    foreign = {"messages": [*PROMPT, said(CUT)], "finish_reason": "length", "response_token_ids": [5, 6]}
    records += [foreign, {"prompt": PROMPT, "response": CUT}]
    path = write_jsonl(tmp_path / "demonstrations.jsonl", records)
    arguments = run_sft.Arguments(model_name_or_path="", dataset_name_or_path=str(path), output_dir="")
    counted = Counter()
    rows = list(rows_of_demonstrations(tokenizer, arguments.max_length, run_sft.demonstrations(arguments), Drops(), counted))
    learnt = [[label for label in row["labels"] if label != -100] for row in rows]
    prompt = prompt_token_ids(tokenizer, PROMPT, "here")
    assert all(row["input_ids"] == prompt + made for row, made in zip(rows, learnt, strict=True))
    if with_ids:
        assert learnt[:2] == [ids[STOPPED], ids[CUT]]
    assert [made[-1] == end for made in learnt] == [True, False, False, True]
    assert all(decodes_to(tokenizer, made, record) for made, record in zip(learnt, (STOPPED, CUT, CUT, CUT), strict=True))
    assert counted[SAMPLED] == 2 * with_ids and counted[FOREIGN] == 1


def test_a_side_of_a_pair_is_demonstrated_as_it_was_sampled(tokenizer, tmp_path):
    pair = {"prompt": PROMPT, "chosen": CUT, "rejected": STOPPED, "chosen_finish_reason": "length"}
    pairs = [pair, pair | {"chosen_token_ids": letters(tokenizer, CUT)}]
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    arguments = run_sft.Arguments(model_name_or_path="", dataset_name_or_path=str(path), output_dir="", output_key="chosen")
    demonstrations = list(run_sft.demonstrations(arguments))
    given = arguments.model_dump(include={"model_name_or_path", "dataset_name_or_path", "output_dir", "output_key"})
    assert list(examples(run_kd.Arguments(**given, teacher_model=""), str(path))) == demonstrations
    rows = list(rows_of_demonstrations(tokenizer, 256, demonstrations, Drops(), Counter()))
    learnt = [[label for label in row["labels"] if label != -100] for row in rows]
    assert learnt[0][-1] != tokenizer.eos_token_id and learnt[1] == letters(tokenizer, CUT)


def test_a_sampled_demonstration_is_learnt_though_its_template_leaves_out_thoughts(tokenizer):
    own = copy.copy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    text = "A sea.</think>A warm film."
    ids = [*letters(own, text), own.eos_token_id]
    with pytest.raises(InputError, match="message 2 differently once it is answered"):
        row_of(own, Demonstration("here", [*PROMPT, said(text)], None, "stop"))
    row, source = row_of(own, Demonstration("here", [*PROMPT, said(text)], ids, "stop"))
    prompt = prompt_token_ids(own, PROMPT, "here")
    assert source == SAMPLED and row == {"input_ids": [*prompt, *ids], "labels": [-100] * len(prompt) + ids}


def test_bad_token_ids_of_a_demonstration_are_refused_and_a_row_that_teaches_nothing_is_dropped(tokenizer, tmp_path):
    record = {"messages": [*PROMPT, said("")], "finish_reason": "length"}
    path = write_jsonl(tmp_path / "demonstrations.jsonl", [record, {**record, "response_token_ids": [[1]]}])
    arguments = run_sft.Arguments(model_name_or_path="", dataset_name_or_path=str(path), output_dir="")
    drops = Drops()
    rows = rows_of_demonstrations(tokenizer, arguments.max_length, run_sft.demonstrations(arguments), drops, Counter())
    with pytest.raises(InputError, match=r"demonstrations\.jsonl:2: `response_token_ids` must be a list of token ids"):
        next(rows)
    assert drops.counts == {"no token to learn": 1}


@pytest.mark.parametrize(("known", "listed"), [(2, [2, 7]), ([2, 5], [2, 5, 7]), (None, [7]), ([7, 2], [7, 2])])
def test_a_finished_model_stops_where_its_template_ends_a_response(tmp_path, known, listed):
    core = Tokenizer(WordLevel({word: n for n, word in enumerate(["a", "b", "</s>", "c", "d", "e", "f"])}, "a"))
    own = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    own.add_tokens([AddedToken("<|eot_id|>", special=True)])
    own.chat_template = "{% for m in messages %}{{ m.content }}<|eot_id|>\n{% endfor %}"
    assert "<|eot_id|>" not in own.all_special_tokens
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": known, "temperature": 0.6, "_from_model_config": True}))
    stop_at_end_of_turn(tmp_path, own, [*OPENING, said("b")], "here")
    settings = json.loads(path.read_text())
    assert settings["eos_token_id"] == listed and settings["temperature"] == 0.6
    path.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": known}))
    stop_at_end_of_turn(tmp_path, own, [*OPENING, said("b")], "here")
    assert sorted(json.loads(path.read_text())["eos_token_id"]) == sorted(listed)


def test_an_end_in_ordinary_words_is_named_and_stops_no_engine(tokenizer, tmp_path, caplog):
    own = copy.copy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ m.content }} The end.\n{% endfor %}"
    (tmp_path / "config.json").write_text("{}")
    stop_at_end_of_turn(tmp_path, own, [*OPENING, said("b")], "here")
    assert "sample with --stop" in caplog.text and not (tmp_path / "generation_config.json").exists()
