"""`python -m baton.data`: a report of what a file holds, and its records without duplicates, each side of a split by prompt."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton import jsonl
from baton.data import __main__ as program
from baton.data.convert import is_held_out
from baton.data.near import NearDuplicates, grams
from baton.data.survey import statistics
from baton.errors import FailuresListed, InputError
from tests.programs import ROOT, write_jsonl

PAIR = {"prompt": "Is it good?", "chosen": "Yes, a warm film.", "rejected": "No."}
SIDES = ("chosen", "rejected")


def run(monkeypatch, *words):
    """Run the program in this process."""
    monkeypatch.setattr(sys, "argv", ["baton.data", *map(str, words)])
    program.main()


def records_in(path):
    return [record for _, record in jsonl.read(path)]


def test_check_says_what_a_file_holds_and_ends_with_3_where_records_were_refused(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [PAIR, PAIR, PAIR | {"rejected": 5}, PAIR | {"chosen": "\x1b[2J", "n": 1}])
    path.write_bytes(path.read_bytes() + b"\nnot JSON\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "baton.data", "check", path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "preferences, read from pairs (`prompt`, `chosen`, `rejected`)" in done.stdout
    assert "5 records, 2 refused; 3 preferences in them" in done.stdout
    assert f"refused: `rejected` must be a string or a list of messages ({path}:3)" in done.stdout
    assert "refused: not JSON" in done.stdout and f"({path}:6)" in done.stdout
    assert "exact duplicates: 1; repeated prompts: 2" in done.stdout
    assert "user: Is it good?" in done.stdout and "chosen: ⟦Yes, a warm film.⟧" in done.stdout
    assert "\\x1b[2J" in done.stdout and "\x1b" not in done.stdout
    assert "2 records were refused, of 5" in done.stderr


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "Hello"}, "prompts, read from prompts"),
        ({"text": "It opens at sea."}, "demonstrations, read from plain text"),
        ({"prompt": "x", "completion": "y", "label": True}, "labelled, read from KTO"),
        ({"prompt": "x", "completions": ["y"], "labels": [True]}, "stepwise, read from steps with labels"),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
            "demonstrations, read from ShareGPT",
        ),
        ({"prompt": "x", "responses": ["a", "b"], "rewards": [1, 2]}, "preferences, read from responses with rewards"),
    ],
)
def test_check_tells_the_kind_by_the_first_record(record, says, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "check", write_jsonl(tmp_path / "data.jsonl", [record]))
    assert says in capsys.readouterr().out


def test_check_takes_files_with_rates_keys_and_a_most(tmp_path, monkeypatch, capsys):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [{"q": f"{i} {n}", "a": "x"} for n in range(9)]) for i in range(2)]
    words = ["--as=demonstrations", "--dataset_key", "q", "--output_key", "a", "--dataset_probs", "0.5,0.5", "--max_samples", 6]
    run(monkeypatch, "check", ",".join(map(str, files)), *words)
    assert "6 records, 0 refused; 6 demonstrations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chek", "x.jsonl"], "`chek`: the commands are check and convert"),
        (["check", "{}", "--as", "pairs"], "`kind`: .*'prompts'"),
        (["check", "{}", "--dataset_kee", "x"], "unknown setting `dataset_kee`: did you mean `dataset_key`"),
        (["check", "absent.jsonl"], "absent.jsonl: no such file"),
        (["check", "{}", "{}"], "one word too many before the flags; several files have commas between"),
        (["check", "{}"], "none of its first 100 records has a known shape .*--as"),
        (["check", "{}", "--dataset_probs", "0.5,0.5"], "2 numbers for 1 datasets"),
        (["convert", "{}"], "`output_dir` is required"),
        (["convert", "{}", "out.json"], "give a name that ends in .jsonl"),
    ],
)
def test_what_cannot_be_done_is_refused(words, message, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "x"}])
    with pytest.raises(InputError, match=message):
        run(monkeypatch, *(word.format(path) for word in words))


def test_an_empty_file_is_said_to_be_empty(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="holds no records"):
        run(monkeypatch, "check", write_jsonl(tmp_path / "data.jsonl", []))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "x"}'.encode("utf-16"), r"data\.jsonl:1: in UTF-16; `iconv"),
        (gzip.compress(b'{"prompt": "x"}', mtime=0), r"data\.jsonl:1: compressed by gzip"),
        (b'{\n  "prompt": "x"\n}\n', r"data\.jsonl:1: a record, or a list, over several lines"),
        (b"{'prompt': 'x'}\n", r"data\.jsonl:1: not JSON"),
    ],
)
def test_a_file_of_which_no_line_is_json_is_named_with_what_it_is(content, message, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(monkeypatch, "check", tmp_path / "data.jsonl")


def test_check_of_refused_records_alone_still_reports(tmp_path, monkeypatch, capsys):
    with pytest.raises(FailuresListed, match="1 records were refused, of 1"):
        run(monkeypatch, "check", write_jsonl(tmp_path / "data.jsonl", [{"question": "x"}]), "--as", "prompts")
    assert "0 prompts in them" in capsys.readouterr().out


TEMPLATE = """
{%- for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}
{%- if add_generation_prompt %}<assistant> {% endif %}"""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A tokenizer of words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "<user>", "<assistant>", *"Is it good ? Yes No a warm film cold".split()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("record", "learnt", "tokens"),
    [
        ({"prompt": "Is it good ?"}, [], (7, 0)),
        ({"prompt": "Is it good ?", "response": "a warm film"}, ["a warm film </s>"], (11, 4)),
        (
            {"prompt": "Is it good ?", "chosen": "Yes", "rejected": "No a cold film"},
            ["Yes </s>", "No a cold film </s>"],
            (14, 7),
        ),
        (
            {"prompt": "Is it good ?", "chosen": "Yes", "rejected": "No a", "rejected_finish_reason": "length"},
            ["Yes </s>", "No a"],
            (11, 4),
        ),
        (
            {"prompt": "Is it good ?", "response": "a warm", "response_token_ids": [10, 11], "finish_reason": "length"},
            ["a warm"],
            (9, 2),
        ),
        ({"prompt": "Is it good ?", "completion": "No", "label": 0}, ["No </s>"], (9, 2)),
        ({"text": "Is it a film ?"}, ["Is it a film ? </s>"], (6, 6)),
    ],
)
def test_check_shows_what_a_model_reads_and_marks_what_it_learns(
    record, learnt, tokens, tokenizer_folder, tmp_path, monkeypatch, capsys
):
    run(monkeypatch, "check", write_jsonl(tmp_path / "data.jsonl", [record]), "--tokenizer", tokenizer_folder)
    report = capsys.readouterr().out
    assert [marked.partition("⟧")[0].strip() for marked in report.split("⟦")[1:]] == learnt
    counts = {line[:24].strip(): int(line.split()[-1]) for line in report.splitlines() if line.startswith("tokens")}
    assert (counts["tokens"], counts["tokens learnt"]) == tokens


def test_of_a_plain_text_every_token_is_learnt_and_its_end(tokenizer_folder):
    from baton.models.templates import load_tokenizer
    from baton.training.demonstrations import PLAIN, Demonstration, row_of

    tokenizer = load_tokenizer(str(tokenizer_folder))
    row, source = row_of(tokenizer, Demonstration("here", "a warm film", None, None))
    assert tokenizer.decode(row["input_ids"]).split() == ["a", "warm", "film", "</s>"]
    assert (row["labels"], source) == (row["input_ids"], PLAIN)


PROMPT_TEXTS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=25)


@settings(max_examples=25)
@given(PROMPT_TEXTS, st.sampled_from([0.2, 0.5, 0.8]))
def test_a_split_is_by_prompt_keeps_every_record_and_does_not_depend_on_the_others(prompts, split):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        path = write_jsonl(Path(folder, "data.jsonl"), [{"prompt": p, "response": str(i)} for i, p in enumerate(prompts)])
        run(monkeypatch, "convert", path, Path(folder, "out.jsonl"), "--split", split)
        sides = [records_in(Path(folder, name)) for name in ("out.jsonl", "out.heldout.jsonl")]
    said = [[record["messages"][0]["content"] for record in side] for side in sides]
    assert Counter(said[0] + said[1]) == Counter(prompts) and not set(said[0]) & set(said[1])
    ids = [record["id"] for side in sides for record in side]
    assert len(set(ids)) == len(prompts)
    assert all(is_held_out(int(record["id"][:16], 16), split) == (side is sides[1]) for side in sides for record in side)


def test_about_the_part_that_is_given_is_held_out():
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    assert sum(is_held_out(int(hash_), 0.05) for hash_ in hashes) == pytest.approx(1000, rel=0.1)
    assert not is_held_out(0, None)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=9))
def test_of_exact_duplicates_the_first_is_kept_and_the_others_are_counted(responses):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        path = write_jsonl(
            Path(folder, "data.jsonl"), [{"prompt": "x", "response": r, "n": i} for i, r in enumerate(responses)]
        )
        run(monkeypatch, "convert", path, Path(folder, "out.jsonl"), "--dedup", "exact")
        kept = records_in(Path(folder, "out.jsonl"))
        manifest = json.loads(Path(folder, "out.jsonl.manifest.json").read_text())
    assert [record["n"] for record in kept] == [i for i, r in enumerate(responses) if r not in responses[:i]]
    assert manifest["counts"]["in"] == len(responses) == len(kept) + sum(manifest["counts"]["dropped"].values())


def test_convert_leaves_out_what_is_refused_or_of_unfit_length_and_says_so(tmp_path, monkeypatch):
    long = PAIR | {"rejected": "x" * 60}
    path = write_jsonl(tmp_path / "data.jsonl", [PAIR | {"kept": 1}, long, {"prompt": "x"}, PAIR | {"prompt": "?"}])
    out = tmp_path / "out.jsonl"
    words = ["convert", path, out, "--max_response_characters", 50, "--min_prompt_characters", 2]
    run(monkeypatch, *words)
    (record,) = records_in(out)
    assert record == PAIR | {"id": record["id"], "prompt": [{"role": "user", "content": "Is it good?"}], "kept": 1}
    counts = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["counts"]
    assert counts == {
        "in": 4,
        "out": 1,
        "dropped": {
            "response longer than max_response_characters 50": 1,
            "refused: the record has no `chosen`; a preference needs `chosen` and `rejected`": 1,
            "prompt shorter than min_prompt_characters 2": 1,
        },
    }
    before = out.stat().st_mtime_ns
    run(monkeypatch, *words)  # up to date
    assert out.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="finished, of another task"):
        run(monkeypatch, *words, "--dedup", "exact")


def test_a_held_out_file_that_is_gone_comes_back_and_one_of_an_earlier_split_goes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "data.jsonl", [PAIR | {"prompt": str(i)} for i in range(50)])
    out, held_out = tmp_path / "out.jsonl", tmp_path / "out.heldout.jsonl"
    words = ["convert", path, out]
    run(monkeypatch, *words, "--split", 0.5)
    before = held_out.read_bytes(), out.read_bytes()
    held_out.unlink()
    run(monkeypatch, *words, "--split", 0.5)
    assert (held_out.read_bytes(), out.read_bytes()) == before
    run(monkeypatch, *words, "--overwrite")
    assert len(records_in(out)) == 50 and not held_out.exists()
    write_jsonl(held_out, [PAIR])
    run(monkeypatch, *words, "--overwrite")
    assert records_in(held_out) == [PAIR]  # of no split, so it is somebody's own
    assert not list(tmp_path.glob("*.old"))


def test_what_was_converted_is_converted_to_itself(tmp_path, monkeypatch):
    path = write_jsonl(
        tmp_path / "data.jsonl",
        [PAIR, PAIR, {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
    )
    run(monkeypatch, "convert", path, tmp_path / "once.jsonl")
    run(monkeypatch, "convert", tmp_path / "once.jsonl", tmp_path / "twice.jsonl")
    assert records_in(tmp_path / "twice.jsonl") == records_in(tmp_path / "once.jsonl")
    assert len({record["id"] for record in records_in(tmp_path / "once.jsonl")}) == 3


def test_near_duplicates_are_texts_whose_3_grams_are_alike():
    pytest.importorskip("datasketch")
    generator = np.random.default_rng(0)
    words = [f"word{i}" for i in range(500)]
    texts = [" ".join(generator.choice(words, 100)) for _ in range(30)]
    near = NearDuplicates(0.8)
    assert all(near.is_new(text) for text in texts)
    assert not any(near.is_new(text + " end") or near.is_new(text.upper()) for text in texts)
    assert all(near.is_new(" ".join(text.split()[::-1])) for text in texts)
    assert all(near.is_new("prompt", *pair) for pair in (texts[:2], texts[1::-1]))
    assert all(near.is_new(texts[0], label=label) for label in (True, False))


def test_near_duplicates_without_their_package_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(InputError, match="needs the package datasketch: run bash"):
        NearDuplicates(0.8)


def test_grams_are_those_of_words_whatever_their_case_and_spaces():
    assert grams("A  b\nC d") == [b"a b c", b"b c d"] and grams("One two") == [b"one two"] and grams("") == [b""]


@given(st.lists(st.integers(0, 10_000), min_size=1))
def test_statistics_are_those_of_the_sorted_lengths(lengths):
    mean, median, most, longest = statistics(array("I", lengths))
    ordered = sorted(lengths)
    assert mean == pytest.approx(np.mean(lengths)) and longest == ordered[-1]
    assert median == ordered[len(lengths) // 2] and most == ordered[int(0.95 * (len(lengths) - 1))]


MEASURE = """
import sys
from baton.data.__main__ import main
main()
status = open("/proc/self/status").read()  # getrusage would count what the parent process used as well
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def test_check_holds_at_most_64_bytes_a_record(tmp_path):
    peaks = {}
    for count in (2_000, 40_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("wb") as file:
            file.writelines(b'{"prompt":"%d","chosen":"%b","rejected":"y"}\n' % (i, b"x" * 200) for i in range(count))
        command = [sys.executable, "-c", MEASURE, "check", str(path), "--show", "0"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout.split()[-1]) * 1024
    assert (peaks[40_000] - peaks[2_000]) / 38_000 < 64
