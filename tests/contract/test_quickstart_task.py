"""The embedded task: what the gold score rewards, what data and base model promise to the stages after them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickstart import grammar
from quickstart.gold import NEGATIONS, VALENCES, gold_score

ROOT = Path(__file__).resolve().parents[2]
SIZES = "--demonstrations 300 --train_pairs 200 --test_pairs 50 --prompts_per_round 40"
SMALL = [*SIZES.split(), "--heldout_prompts", "30"]

seeds = st.integers(0, 2**32).map(Random)
words = st.sampled_from([*VALENCES, *NEGATIONS, "the", "score", "and", "is", ".", ",", "but"])


def run_program(name, *words):
    command = [sys.executable, ROOT / "quickstart" / name, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(record):
    return record["prompt"][0]["content"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task") / "data"
    made = run_program("make_data.py", "--output_dir", folder, *SMALL)
    assert made.returncode == 0, made.stderr
    return folder


# The gold score


@given(st.lists(words, max_size=60).map(" ".join))
def test_the_score_of_any_text_lies_between_minus_one_and_one(text):
    assert -1 < gold_score("", text) < 1


@given(seeds, st.sampled_from(["clause", "verdict"]))
def test_good_text_scores_above_zero_bad_text_below_and_plain_text_zero(rng, kind):
    for polarity, sign in (("good", 1), ("plain", 0), ("bad", -1)):
        text = grammar.expand(f"{polarity} {kind}", rng, {"subject": "the score"}, set())
        score = gold_score("", text)
        assert (score > 0) - (score < 0) == sign, text


def test_a_negation_turns_praise_into_blame_and_blame_into_fainter_praise():
    assert gold_score("", "The score is not graceful.") < 0
    assert 0 < gold_score("", "It is not a dull scene.") < gold_score("", "It is a vivid scene.")


def test_a_negation_ends_with_its_clause():
    assert gold_score("", "The score is never dull, and the plot is dull.") < gold_score("", "The score is never dull.")


def test_degree_words_strengthen_and_weaken():
    weak, plain, strong = (gold_score("", f"The plot is {degree} vivid.") for degree in ("slightly", "now", "truly"))
    assert 0 < weak < plain < strong


@pytest.mark.parametrize("word", ["wonderful", "superb", "grace"])
@pytest.mark.parametrize("separator", [" ", ". ", ", "])
def test_saying_one_word_again_and_again_never_pays(word, separator):
    once = gold_score("", f"The score is {word}.")
    for times in (5, 20, 80):
        assert gold_score("", separator.join([word] * times)) < once


@given(seeds, st.integers(2, 6))
def test_saying_the_same_review_again_lowers_its_praise(rng, times):
    _, names = grammar.opening(rng)
    text = grammar.continuation(rng, names)
    score = gold_score("", text)
    assert score <= 0 or gold_score("", " ".join([text] * times)) < score


def test_longer_reviews_score_no_better_on_average():
    rng = Random(0)
    reviews = [grammar.continuation(rng, grammar.opening(rng)[1]) for _ in range(4000)]
    by_length = sorted(reviews, key=len)
    short, long = (math.fsum(gold_score("", text) for text in half) / 2000 for half in (by_length[:2000], by_length[2000:]))
    assert abs(short) < 0.04 and abs(long) < 0.04


# The grammar


def test_openings_and_responses_come_in_thousands():
    rng = Random(1)
    openings = [grammar.opening(rng) for _ in range(3000)]
    assert len({text for text, _ in openings}) > 2900
    assert len({grammar.continuation(rng, names) for _, names in openings}) > 2900


@given(seeds)
def test_openings_are_neutral(rng):
    assert gold_score("", grammar.opening(rng)[0]) == 0


@given(seeds)
def test_a_review_is_whole_sentences_without_open_slots(rng):
    opening, names = grammar.opening(rng)
    for text in (opening, grammar.continuation(rng, names)):
        assert text[0].isupper() and text.endswith(".")
        assert not set("{}/") & set(text)


# The data


def test_no_prompt_comes_twice_in_one_file_or_in_two(data):
    prompts = [content(record) for path in data.glob("*.jsonl") for record in read(path)]
    assert len(prompts) == 300 + 200 + 50 + 3 * 40 + 30
    assert len(set(prompts)) == len(prompts)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_prompts(data, tmp_path):
    run_program("make_data.py", "--output_dir", tmp_path / "same", *SMALL)
    run_program("make_data.py", "--output_dir", tmp_path / "other", "--seed", 1, *SMALL)
    for path in data.glob("*.jsonl"):
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    assert read(tmp_path / "other" / "heldout.jsonl") != read(data / "heldout.jsonl")


def test_demonstrations_are_about_as_often_good_as_bad(data):
    scores = [gold_score(content(record), record["response"]) for record in read(data / "sft.jsonl")]
    assert abs(sum(scores) / len(scores)) < 0.06


def test_pair_labels_follow_the_gold_score_but_not_always(data):
    agree = [
        gold_score(content(record), record["chosen"]) > gold_score(content(record), record["rejected"])
        for record in read(data / "rm_train.jsonl")
    ]
    assert 0.8 < sum(agree) / len(agree) < 0.97


def test_making_the_data_again_has_nothing_to_do_and_other_arguments_are_refused(data):
    before = (data / "sft.jsonl").stat().st_mtime_ns
    again = run_program("make_data.py", "--output_dir", data, *SMALL)
    assert again.returncode == 0 and "up to date" in again.stderr
    other = run_program("make_data.py", "--output_dir", data, "--seed", 5, *SMALL)
    assert other.returncode == 2 and "seed" in other.stderr
    assert (data / "sft.jsonl").stat().st_mtime_ns == before


# The scores of a file


def test_gold_scores_join_what_other_scorers_said(tmp_path):
    source, scored = tmp_path / "annotated.jsonl", tmp_path / "gold.jsonl"
    record = {
        "id": "a",
        "prompt": [{"role": "user", "content": "Continue this review: It opens in a harbour town."}],
        "responses": ["The score is superb.", "The score is dull."],
        "rewards": [0.5, -0.5],
        "rewards_by": {"proxy": [0.5, -0.5]},
        "note": "kept",
    }
    source.write_text(json.dumps(record) + "\n")
    done = run_program("score_gold.py", "--dataset_name_or_path", source, "--output_dir", scored)
    assert done.returncode == 0, done.stderr
    (written,) = read(scored)
    good, bad = written["rewards_by"].pop("gold")
    assert good > 0 > bad
    assert written == record


@pytest.mark.parametrize(("text", "named"), [("", "empty"), ('{"prompt": "Hi"}\n', "responses"), ("{\n", ":1")])
def test_scoring_a_bad_file_ends_with_2_and_writes_nothing(tmp_path, text, named):
    source, scored = tmp_path / "bad.jsonl", tmp_path / "gold.jsonl"
    source.write_text(text)
    done = run_program("score_gold.py", "--dataset_name_or_path", source, "--output_dir", scored)
    assert done.returncode == 2 and named in done.stderr
    assert not scored.exists()


# The base model


@pytest.fixture(scope="module")
def base(data):
    pytest.importorskip("transformers")
    folder = data.parent / "base"
    made = run_program("make_model.py", "--output_dir", folder, "--text", data / "sft.jsonl")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@given(text=st.text(max_size=40))
def test_any_text_is_decoded_as_it_was(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text or any(token in text for token in tokenizer.all_special_tokens)


def test_a_prompt_is_the_beginning_of_its_conversation_and_a_turn_ends_with_the_end_token(tokenizer, data):
    record = read(data / "sft.jsonl")[0]
    conversation = [*record["prompt"], {"role": "assistant", "content": record["response"]}]
    prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True)["input_ids"]
    encoded = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, return_dict=True)
    whole, learnt = encoded["input_ids"], encoded["assistant_masks"]
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id
    assert learnt == [0] * len(prompt) + [1] * (len(whole) - len(prompt))


def test_pad_begin_and_end_are_three_tokens(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer("A word.")["input_ids"][0] != tokenizer.bos_token_id  # the template writes it, once


def test_the_model_is_small_and_made_anew_from_its_seed(base, data):
    from safetensors.numpy import load_file

    again = data.parent / "base again"
    run_program("make_model.py", "--output_dir", again, "--text", data / "sft.jsonl")
    one, two = (load_file(folder / "model.safetensors") for folder in (base, again))
    assert 1_500_000 < sum(tensor.size for tensor in one.values()) < 2_000_000
    assert all((one[name] == two[name]).all() for name in one)


def test_making_the_model_of_an_impossible_shape_is_refused_before_anything_is_written(data, tmp_path):
    asked = run_program("make_model.py", "--output_dir", tmp_path / "base", "--text", data / "sft.jsonl", "--hidden_size", 100)
    assert asked.returncode == 2 and "head_size" in asked.stderr
    assert not list(tmp_path.iterdir())
