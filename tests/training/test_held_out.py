"""Prompts are held out whole: whatever there is of one is trained on, or evaluated on, and counted once."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InputError
from baton.training.held_out import NONE, held_out_prompts, of_prompts, without
from dpo_iteration import pair_rows, run_dpo, run_kto
from dpo_iteration.example_rows import holds_out, prompts_aside
from dpo_iteration.pair_rows import held_out_every, held_out_source
from tests.programs import read_jsonl, run_program, write_jsonl

SHORT = [
    "--max_length", 128, "--max_prompt_length", 64, "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false",
    "--per_device_train_batch_size", 8, "--logging_steps", 1, "--max_steps", 1,
]  # fmt: skip


@given(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=40).filter(lambda p: len(set(p)) > 1), st.integers(2, 12))
def test_every_record_is_on_one_side_and_all_of_a_prompt_on_the_same(prompts, every):
    records = [(f"file:{number}", {"prompt": prompt, "number": number}) for number, prompt in enumerate(prompts)]
    aside = held_out_prompts(records, every, "file")
    learnt, evaluated = list(without(records, aside)), list(of_prompts(records, aside))
    assert sorted(record["number"] for _, record in learnt + evaluated) == list(range(len(prompts)))
    sides = [{record["prompt"] for _, record in side} for side in (learnt, evaluated)]
    assert not sides[0] & sides[1]
    different = list(dict.fromkeys(prompts))
    assert sides[1] == set(different[every - 1 :: every] or different[-1:])
    if len(different) >= 4:
        two = held_out_prompts(records, every, "file", 2)
        assert 2 <= len(two) <= len(different) - 2 and (two == aside or len(aside) == 1)
    assert list(without(records, NONE)) == records


def test_a_single_prompt_cannot_be_held_out():
    with pytest.raises(InputError, match="`eval_every`: mine has 1 different prompts, and 2 or more are needed"):
        held_out_prompts([("a", {"prompt": "Hi"}), ("b", {"prompt": "Hi"})], 3, "mine")
    with pytest.raises(InputError, match="`eval_every`: mine has 3 different prompts, and 4 or more are needed to hold 2 out"):
        held_out_prompts([(text, {"prompt": text}) for text in "abc"], 3, "mine", 2)


@pytest.fixture(scope="module")
def repeated(annotated, tmp_path_factory):
    """Annotated responses of 48 prompts, and those of the 6th and 7th prompt once more at the end."""
    records = [{name: record[name] for name in record if name != "id"} for record in read_jsonl(annotated)]
    return write_jsonl(tmp_path_factory.mktemp("repeated") / "annotated.jsonl", [*records, *records[5:7]])


def outcome(program, task, data, output, *more):
    words = ["--model_name_or_path", task / "base", "--dataset_name_or_path", data, "--output_dir", output, *SHORT, *more]
    done = run_program(program, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(output.with_name(f"{output.name}.manifest.json").read_text())


def test_dpo_evaluates_on_one_prompt_in_so_many_and_trains_on_none_of_these_again(task, repeated, tmp_path):
    prompts = [record["prompt"] for record in read_jsonl(repeated)]
    first = [{"prompt": prompt, "chosen": "A warm film.", "rejected": "A mess."} for prompt in prompts[4:6]]
    (tmp_path / "round1").mkdir()
    write_jsonl(tmp_path / "round1/pairs.jsonl", first)
    pairs_path = tmp_path / "round2/pairs.jsonl"
    words = ["--eval_every", 6, "--history", 1, "--pairs_path", pairs_path]
    manifest = outcome("dpo_iteration/run_dpo.py", task, repeated, tmp_path / "round2/policy", *words)
    trained_on = [pair["prompt"] for pair in read_jsonl(pairs_path)]
    held_out = prompts[5:48:6]
    assert len(held_out) == 8 and not any(prompt in held_out for prompt in trained_on)
    assert len(trained_on) == 50 - 9 and trained_on.count(prompts[6]) == 2
    assert manifest["held_out"] == {"pairs": 9, "dropped": {}} and manifest["metrics"]["eval_loss"] > 0
    dropped = {"pairs of earlier rounds whose prompt is held out": 1}
    assert manifest["counts"] == {"in": 43, "out": 42, "dropped": dropped}
    policy = tmp_path / "round2/policy"
    given = ["--model_name_or_path", task / "base", "--dataset_name_or_path", repeated, "--output_dir", policy, *SHORT, *words]
    done = run_program("dpo_iteration/run_dpo.py", *given, "--do_eval", "false")  # trains on what was held out: another task
    assert done.returncode == 2 and "held_out_every (6, now None)" in done.stderr, done.stderr


def test_a_held_out_file_comes_before_eval_every_and_do_eval_false_before_both():
    given = {"model_name_or_path": "m", "dataset_name_or_path": "d", "output_dir": "o", "eval_every": 6}
    dpo = [run_dpo.Arguments(**given, **more) for more in ({}, {"eval_dir": "held_out.jsonl"})]
    assert [held_out_every(arguments, {"do_eval": True}) for arguments in dpo] == [6, None]
    assert [held_out_source(arguments, {}) for arguments in dpo] == [None, "held_out.jsonl"]
    assert all(held_out_every(each, {"do_eval": "false"}) is held_out_source(each, {"do_eval": False}) is None for each in dpo)
    kto = run_kto.Arguments(**given, eval_dataset_name_or_path="held_out.jsonl")
    assert prompts_aside(kto, 2) == NONE and holds_out(kto)


def test_a_most_of_pairs_keeps_the_rates_of_a_mixture_in_training_and_among_what_is_held_out(tmp_path):
    files = []
    for name in "AB":
        pairs = [{"prompt": f"{name} {i}", "chosen": "A warm film.", "rejected": "A mess.", "from": name} for i in range(200)]
        files.append(str(write_jsonl(tmp_path / f"{name}.jsonl", pairs)))
    given = {"model_name_or_path": "m", "output_dir": "o", "dataset_name_or_path": ",".join(files), "eval_every": 10}
    arguments = run_dpo.Arguments(**given, dataset_probs="0.5,0.5", max_training_samples=100)
    aside = pair_rows.prompts_aside(arguments, 10)
    account = pair_rows.write_chosen(arguments, tmp_path / "pairs.jsonl", aside)
    written = Counter(pair["from"] for pair in read_jsonl(tmp_path / "pairs.jsonl"))
    assert len(aside) == 10 and written.total() == 90 == account.counted["in"] and min(written.values()) > 30


def test_kto_evaluates_on_one_prompt_in_so_many(task, repeated, tmp_path):
    manifest = outcome("dpo_iteration/run_kto.py", task, repeated, tmp_path / "policy", "--eval_every", 6)
    prompts = [record["prompt"] for record in read_jsonl(repeated)]
    assert not any(example["prompt"] in prompts[5:48:6] for example in read_jsonl(tmp_path / "policy.examples.jsonl"))
    of_file, dropped = manifest["counts"], manifest["held_out"]["dropped"]
    assert of_file["in"] == 4 * (50 - 9) == of_file["out"] + sum(of_file["dropped"].values())
    assert manifest["held_out"]["examples"] + sum(dropped.values()) == 4 * 9 and manifest["metrics"]["eval_loss"] > 0
