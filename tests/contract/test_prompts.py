"""Prompt sets: formats read alike, ids stable and unique, each prompt in exactly one shard, memory flat."""

import codecs
import gzip
import os
import subprocess
import sys
from collections import Counter
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import orjson
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import jsonl
from baton.ahead import check_there
from baton.errors import InputError
from baton.mixing import Selection, select_rows
from baton.prompts import PromptSet, mixed_records, ordinals, read_records, shard_range, with_ids
from baton.records import prompt_hash, prompt_id
from baton.sources import check_hub

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [{"prompt": f"prompt {i}", "extra": i} for i in range(7)]


def write_lines(path: Path, records: list) -> Path:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def write_as(path: Path) -> Path:
    """RECORDS in the format that the file's name says."""
    lines = b"".join(orjson.dumps(record) + b"\n" for record in RECORDS)
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif path.name == "list.json":
        path.write_bytes(orjson.dumps(RECORDS))
    elif path.name == "instances.json":
        path.write_bytes(orjson.dumps({"type": "text_only", "instances": RECORDS}))
    else:
        path.write_bytes(lines.replace(b"\n", b"\n\n"))
    return path


@given(total=st.integers(0, 5000), count=st.integers(1, 64))
def test_every_position_lands_in_exactly_one_shard_and_sizes_differ_by_at_most_one(total, count):
    shards = [shard_range(total, index, count) for index in range(count)]
    assert [position for shard in shards for position in shard] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(texts=st.lists(st.sampled_from("abcde"), min_size=1, max_size=30), count=st.integers(1, 40))
def test_every_prompt_lands_in_exactly_one_shard_with_the_id_it_has_in_any_other_split(texts, count):
    with TemporaryDirectory() as folder:
        path = write_lines(Path(folder) / "p.jsonl", [{"prompt": t, "n": n} for n, t in enumerate(texts)])
        prompts = PromptSet(str(path))
        sharded = [record for index in range(count) for _, _, record, _ in prompts.shard(index, count)]
        whole = [record for _, _, record, _ in prompts.shard(0, 1)]
    assert sharded == whole
    assert [record["n"] for record in whole] == list(range(len(texts)))
    assert len({record["id"] for record in whole}) == len(texts)


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=60))
def test_equal_prompts_are_numbered_in_their_order(hashes):
    seen: Counter[int] = Counter()
    expected = []
    for hash_ in hashes:
        expected.append(seen[hash_])
        seen[hash_] += 1
    assert ordinals(np.array(hashes, dtype=np.uint64)).tolist() == expected


def test_ids_do_not_change_between_versions_of_the_project():
    messages = [{"role": "user", "content": "Say «hello»."}]
    assert prompt_id(prompt_hash(messages), 0) == "39b61a5b4a331238"
    assert prompt_id(prompt_hash(messages), 2) == "39b61a5b4a331238-2"


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_files_without_ids_get_the_ids_that_a_prompt_set_gives(texts):
    with TemporaryDirectory() as folder:
        path = write_lines(Path(folder) / "p.jsonl", [{"prompt": text} for text in texts])
        prompts = PromptSet(str(path))
        given_ids = [record["id"] for _, record in with_ids(read_records(str(path)))]
    assert given_ids == [prompts.id(position) for position in range(len(texts))]


@pytest.mark.parametrize("value", ["hi", [{"role": "user", "content": "hi"}]], ids=["text", "messages"])
@pytest.mark.parametrize("key", ["prompt", "context_messages"])
def test_a_prompt_is_the_same_as_text_and_as_messages_under_each_known_key(tmp_path, key, value):
    prompts = PromptSet(str(write_lines(tmp_path / "p.jsonl", [{key: value, "other": 1}])))
    [(_, _, record, messages)] = prompts.shard(0, 1)
    assert messages == [{"role": "user", "content": "hi"}]
    assert record["id"] == prompt_id(prompt_hash(messages), 0)
    assert record["other"] == 1


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "list.json", "instances.json", "lines.json", "p.parquet"])
def test_every_format_is_read_alike(tmp_path, name):
    path = write_as(tmp_path / name)
    found = list(read_records(str(path)))
    assert [record for _, record in found] == RECORDS
    assert all(where.startswith(str(path)) for where, _ in found)


def test_columns_of_parquet_that_json_has_no_types_for_are_written_as_numbers_and_texts_or_named(tmp_path):
    row = {
        "prompt": "x",
        "price": [Decimal("1.50")],
        "day": date(2026, 1, 2),
        "at": datetime(2026, 1, 2, 3),
        "took": timedelta(hours=1),
    }
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    ((_, record),) = read_records(str(tmp_path / "p.parquet"))
    written = {"prompt": "x", "price": [1.5], "day": "2026-01-02", "at": "2026-01-02T03:00:00", "took": "1:00:00"}
    assert orjson.loads(jsonl.dump(record)) == written
    for value, kind in ((b"\x00", "bytes"), ({"a": [{1}]}, "set"), (2**65, "64-bit")):
        with pytest.raises(InputError, match=f"`image` of a record cannot be written as JSON .*{kind}.*; leave this field out"):
            jsonl.dump(record | {"image": value})


@pytest.mark.parametrize("name", ["p.jsonl", "list.json", "lines.json"])
def test_files_that_editors_on_windows_write_are_read_alike(tmp_path, name):
    path = write_as(tmp_path / name)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [record for _, record in read_records(str(path))] == RECORDS


def test_any_number_of_files_is_named_with_commas_between(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [write_lines(Path(f"prompts_of_part_{number}.jsonl"), [{"prompt": "a"}]).name for number in range(40)]
    assert len(PromptSet(",".join(names))) == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', ":3: not JSON"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": "b", "rewards": [1, NaN]}\n',
            ":2: `rewards` holds nan, which is not finite",
        ),
        ("p.jsonl", b'{"prompt": "a", "rewards_by": {"rm": [1e999]}}\n', ":1: `rewards_by` holds inf, which is not finite"),
        ("p.jsonl", b'{"prompt": NaN, }\n', ":1: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n[1, 2]\n', ":2: expected a JSON object, got list"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"text": "b"}\n',
            ":2: the record has no `prompt` or `context_messages`",
        ),
        ("p.jsonl", b'{"prompt": "  "}\n', ":1: `prompt` is empty"),
        (
            "p.json",  # as early versions of Online-RLHF write their records
            b'{"type": "text_only", "instances": [{"prompt": "<|start_header_id|>user<|end_header_id|>\\n\\nA film?<|eot_id|>'
            b'<|start_header_id|>assistant<|end_header_id|>\\n\\n", "responses": ["Dune."]}]}',
            ": item 1: `prompt` is a text that a chat template has written already",
        ),
        ("p.jsonl", b'{"prompt": 5}\n', ":1: `prompt` must be a string or a list of messages"),
        ("p.jsonl", b'{"prompt": []}\n', ":1: `prompt` must be"),
        ("p.jsonl", b'{"prompt": [{"role": "user"}]}\n', ":1: `prompt`: `content` must be a string"),
        ("p.jsonl", b'{"prompt": [{"content": "a"}]}\n', ":1: `prompt`: a message needs `role`"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', ":1: not JSON"),
        ("p.jsonl", b"", "holds no records"),
        ("p.jsonl", b"\n\n", "holds no records"),
        ("p.json", b"[1]", "item 1: expected a JSON object, got int"),
        ("p.json", b"5", "expected a list of records, got int"),
        ("p.json", b"[{]", "not JSON"),
        ("p.json", b"[]", "holds no records"),
        ("p.json", b'{"prompt": "a"}\n{"prompt": \n', ":2: not JSON"),
        ("p.json", b'{\n "instances": [1,]\n}\n', "not JSON: trailing comma"),
        ("p.parquet", b"not parquet", "cannot be read as parquet"),
        ("p.jsonl.gz", b"not gzip", "broken gzip file"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-12], "broken gzip file"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:10] + b"\x07" * 30, "broken gzip file"),
        ("p.csv", b"a,b", "expected a file ending in .jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        PromptSet(str(path))
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz", "absent.json", "absent.parquet"])
def test_an_absent_file_is_named(tmp_path, name):
    with pytest.raises(InputError, match=name):
        PromptSet(str(tmp_path / name))


def test_a_folder_with_the_name_of_a_file_is_named(tmp_path):
    (tmp_path / "p.jsonl").mkdir()
    with pytest.raises(InputError, match=r"p\.jsonl: is a directory"):
        PromptSet(str(tmp_path / "p.jsonl"))


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), seed=st.integers(0, 9), weighted=st.booleans())
def test_records_are_mixed_at_the_rates_that_prompts_are(lengths, seed, weighted):
    probs = tuple(weight / sum(range(1, len(lengths) + 1)) for weight in range(1, len(lengths) + 1)) if weighted else None
    with TemporaryDirectory() as folder:
        paths = [
            write_lines(Path(folder) / f"{number}.jsonl", [{"prompt": f"{number} {i}"} for i in range(length)])
            for number, length in enumerate(lengths)
        ]
        source = ",".join(map(str, paths))
        mixed = [record["prompt"] for _, record in mixed_records(source, "train", probs, seed)]
        prompts = PromptSet(source, selection=Selection(probs=probs, seed=seed))
        taken = [record["prompt"][0]["content"] for _, _, record, _ in prompts.shard(0, 1)]
    assert mixed == taken
    assert len(mixed) == len(select_rows(lengths, Selection(probs=probs, seed=seed)))
    assert weighted or len(mixed) == sum(lengths)


@pytest.mark.parametrize("probs", [None, (0.5, 0.5)])
def test_an_empty_file_of_several_is_named(tmp_path, probs):
    full, empty = write_lines(tmp_path / "a.jsonl", RECORDS), write_lines(tmp_path / "b.jsonl", [])
    with pytest.raises(InputError, match=r"b\.jsonl: holds no records"):
        list(mixed_records(f"{full},{empty}", "train", probs, 0))


@pytest.mark.parametrize(("index", "count"), [(-1, 4), (4, 4), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(index, count):
    with pytest.raises(InputError, match="--local_index"):
        shard_range(10, index, count)


def test_a_file_that_cannot_be_written_whole_does_not_replace_the_old_one(tmp_path):
    path = write_lines(tmp_path / "out.jsonl", RECORDS)
    before = path.read_bytes()

    def failing():
        yield {"new": 1}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        jsonl.write(path, failing())
    assert path.read_bytes() == before


MEASURE = """
import sys
from pathlib import Path
from baton.partial import PartialRecords
from baton.prompts import PromptSet
source, output = sys.argv[1], Path(sys.argv[2])
prompts = PromptSet(source)
partial = PartialRecords(output, len(prompts))
for position, _, record, _ in prompts.shard(0, 1):
    partial.append(position, record)
assert partial.assemble() == len(prompts)
status = Path("/proc/self/status").read_text()  # getrusage would count what the parent process used as well
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def test_memory_grows_by_a_few_bytes_a_record_whatever_the_records_hold(tmp_path):
    peaks = {}
    for count in (10_000, 200_000):
        source, output = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.out"
        with source.open("wb") as file:
            file.writelines(b'{"prompt":"prompt %d %b"}\n' % (number, b"x" * 400) for number in range(count))
        command = [sys.executable, "-c", MEASURE, str(source), str(output)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks[count] = int(done.stdout) * 1024
        source.unlink()
        output.unlink()
        output.with_name(output.name + ".partial").unlink()
    assert (peaks[200_000] - peaks[10_000]) / 190_000 < 100  # bytes a record; a record has 430


def test_a_missing_file_whose_twin_has_another_ending_is_named_with_it(tmp_path):
    write_lines(tmp_path / "gen_data.json", RECORDS)  # as Online-RLHF's README merges to .json and annotates .jsonl
    with pytest.raises(InputError, match=r"gen_data\.jsonl: no such file or directory; did you mean \S+gen_data\.json\?"):
        list(read_records(str(tmp_path / "gen_data.jsonl")))


def test_a_file_that_is_named_without_its_ending_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data/prompts.jsonl", RECORDS)
    for look in (lambda name: list(read_records(name)), lambda name: check_hub(name, ahead=True, kind="dataset")):
        with pytest.raises(InputError, match=r"data/prompts: no such file; did you mean data/prompts\.jsonl\?"):
            look("data/prompts")
    with pytest.raises(InputError, match=r"data/prompts: no such file or folder .*did you mean \S+/data/prompts\.jsonl\?"):
        check_there(tmp_path / "data/prompts", "prompts")


def test_a_prefix_is_read_before_the_last_user_turn_and_the_record_stays_as_it_is(tmp_path):
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "A film, please."},
    ]
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": turns}])
    ((_, _, plain, _),) = PromptSet(str(path)).shard(0, 1)
    ((_, _, record, messages),) = PromptSet(str(path), prefix="<reward_5> ").shard(0, 1)
    assert record == {**plain, "prompt_prefix": "<reward_5> "}
    assert messages == [*turns[:2], {"role": "user", "content": "<reward_5> A film, please."}]
    again = write_lines(tmp_path / "again.jsonl", [record])  # as the prompts of a next sampling, which gives no prefix
    ((_, _, unprefixed, messages),) = PromptSet(str(again)).shard(0, 1)
    assert unprefixed == plain and messages == turns
    alone = write_lines(tmp_path / "alone.jsonl", [{"prompt": [{"role": "system", "content": "x"}]}])
    with pytest.raises(InputError, match="no user turn"):
        list(PromptSet(str(alone), prefix="<reward_5> ").shard(0, 1))
