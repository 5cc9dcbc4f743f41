"""Records on disk as they finish: whatever the order, processes and time of death, the output is the same."""

from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.partial import PartialRecords, part_files

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
record_lists = st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=12)


def written(output: Path) -> list[dict]:
    return [orjson.loads(line) for line in output.read_bytes().splitlines()]


@given(records=record_lists, data=st.data())
def test_any_order_on_any_number_of_processes_gives_the_input_order(records, data):
    ranks = data.draw(st.integers(1, 12))
    order = data.draw(st.permutations(range(len(records))))
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as environment:
        output = Path(folder) / "out.jsonl"
        environment.setenv("LOCAL_RANK", "0")
        for rank in range(ranks):
            environment.setenv("RANK", str(rank))
            partial = PartialRecords(output, len(records))
            for position in order[rank::ranks]:
                assert position not in partial
                partial.append(position, records[position])
            partial.close()
        environment.setenv("RANK", "0")
        partial = PartialRecords(output, len(records))
        assert partial.done == len(records)
        assert dict(partial.records()) == dict(enumerate(records))
        assert partial.assemble() == len(records)
        assert written(output) == records


@given(records=record_lists, data=st.data())
def test_a_part_cut_at_any_byte_is_continued_so_that_every_record_is_there_once(records, data):
    with TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        for _ in range(data.draw(st.integers(1, 3))):
            partial = PartialRecords(output, len(records))
            for position, record in enumerate(records):
                if position not in partial:
                    partial.append(position, record)
            partial.close()
            for part in part_files(output):
                content = part.read_bytes()
                part.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        partial = PartialRecords(output, len(records))
        whole = b"".join(part.read_bytes() for part in part_files(output))
        assert whole == b"" or whole.endswith(b"]\n")
        assert whole.count(b"\n") == partial.done
        for position, record in enumerate(records):
            if position not in partial:
                partial.append(position, record)
        assert partial.assemble() == len(records)
        assert written(output) == records


def test_what_another_process_half_wrote_is_done_again_by_whoever_is_left(tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    output.with_name("out.jsonl.partial1").write_bytes(b'[0,{"n":0}]\n[1,{"n":')
    partial = PartialRecords(output, 3)
    assert [position in partial for position in range(3)] == [True, False, False]
    partial.append(1, {"n": 1})
    partial.append(2, {"n": 2})
    assert partial.assemble() == 3
    assert written(output) == [{"n": 0}, {"n": 1}, {"n": 2}]


@pytest.mark.parametrize("name", ["a[1].jsonl", "*.jsonl", "?", "{a,b}.jsonl", "ä ö.jsonl"])
def test_parts_are_those_of_this_output_alone(tmp_path, name):
    for other in (name, "a1.jsonl", "x.jsonl", "xy"):
        for ending in (".partial", ".partial1", ".partial12", ".partial.lock", ".partial.manifest.json"):
            (tmp_path / (other + ending)).touch()
    expected = {f"{name}.partial", f"{name}.partial1", f"{name}.partial12"}
    assert {part.name for part in part_files(tmp_path / name)} == expected
