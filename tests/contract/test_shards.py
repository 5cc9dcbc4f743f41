"""Shards of one task: any number goes on with the work of any other; nothing is done twice, nothing is lost or mixed."""

import os
import re
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton import shards
from baton.arguments import StageArguments, option
from baton.errors import InputError
from baton.locks import Lock
from baton.manifest import in_progress, manifest_path, read_manifest, write_manifest
from baton.partial import PartialRecords, part_files, shard_range
from tests.programs import ROOT

TOTAL = 13


class Arguments(StageArguments):
    temperature: float = option(1.0, "a deciding argument")


class Died(Exception):
    """Stands for the end of a program in the middle."""


DEATHS = ("before finishing", "before the manifest", "before the name", "before the parts are deleted")


@contextmanager
def dying(where: str | None):
    """Context in which `Shard.finish` ends at one of DEATHS."""

    def write_and_die(output, manifest):
        write_manifest(output, manifest)
        raise Died

    replaced = {
        "before the manifest": ("write_manifest", Died),
        "before the name": ("write_manifest", write_and_die),
        "before the parts are deleted": ("_delete_leftovers", Died),
    }.get(where)
    if replaced is None:
        yield
        return
    with patch.object(shards, replaced[0], side_effect=replaced[1]):
        yield


class Work:
    """Programs that sample shards of 13 records at `prefix`; `sampled` lists the positions in the order they were done."""

    def __init__(self, folder: Path):
        self.prefix, self.sampled = folder / "gen", []

    def run(self, index: int, count: int, at_most: int | None = None, dies: str | None = None, **arguments) -> bool:
        """Run one program; returns whether it had anything to do.

        It dies after `at_most` records, or where `dies` says: at the place of DEATHS that finishing a shard passes.
        """
        stage = shards.begin("sample", Arguments(**arguments), self.prefix, index, count, {})
        if stage is None:
            return False
        span = shard_range(TOTAL, index, count)
        partial = PartialRecords(self.prefix, TOTAL, span, stage.part)
        try:
            for done, position in enumerate(p for p in span if p not in partial):
                if done == at_most:
                    raise Died
                partial.append(position, {"n": position, "by": f"{index} of {count}"})
                self.sampled.append(position)
            written = partial.assemble(stage.assembled)
            if dies == "before finishing":
                raise Died
            with dying(dies):
                stage.finish(records_in=len(span), records_out=written, prompts=TOTAL, tokens=0)
        finally:
            partial.close()
            stage.lock.release()
        return True

    def run_all(self, count: int, **arguments) -> list[bool]:
        return [self.run(index, count, **arguments) for index in range(count)]

    def output(self, count: int) -> list[int]:
        """The records of `count` finished shards, one after another."""
        paths = [shards.shard_path(self.prefix, index) for index in range(count)]
        return [orjson.loads(line)["n"] for path in paths for line in path.read_bytes().splitlines()]


@settings(max_examples=60)
@given(st.data())
def test_killed_in_any_number_of_shards_and_finished_in_another_every_record_is_sampled_once(data):
    with TemporaryDirectory() as folder:
        work = Work(Path(folder))
        finished_in = None
        for count in data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)):
            for index in data.draw(st.permutations(range(count))):
                with suppress(Died):
                    at_most, dies = data.draw(st.none() | st.integers(0, 4)), data.draw(st.none() | st.sampled_from(DEATHS))
                    work.run(index, count, at_most, dies)
            finished_in = shards.finished_number(shards.shard_manifests(work.prefix))
            if finished_in:
                break
        last = data.draw(st.integers(1, 6))
        work.run_all(last)
        assert sorted(work.sampled) == list(range(TOTAL))
        assert work.output(finished_in or last) == list(range(TOTAL))
        assert not part_files(work.prefix) and not manifest_path(in_progress(work.prefix)).exists()
        assert not list(Path(folder).glob("*lock*"))
        assert not any(work.run_all(data.draw(st.integers(1, 8))))


def test_a_finished_task_is_up_to_date_in_any_number_of_shards(tmp_path, caplog):
    work = Work(tmp_path)
    work.run_all(3)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for count in (1, 2, 3, 5):
        assert work.run_all(count) == [False] * count
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_finished_records_stay_byte_for_byte_when_the_number_of_shards_changes(tmp_path):
    work = Work(tmp_path)
    for index in (0, 2):
        with suppress(Died):
            work.run(index, 3, at_most=2)
    work.run_all(2)
    by = {record["n"]: record["by"] for index in range(2) for record in
          map(orjson.loads, shards.shard_path(work.prefix, index).read_bytes().splitlines())}  # fmt: skip
    assert [by[n] for n in (0, 1)] == ["0 of 3"] * 2
    assert [by[n] for n in (8, 9)] == ["2 of 3"] * 2
    assert {by[n] for n in range(TOTAL) if n not in (0, 1, 8, 9)} == {"0 of 2", "1 of 2"}


def test_a_shard_of_another_task_is_refused_and_leaves_word_of_it(tmp_path):
    work = Work(tmp_path)
    work.run_all(2)
    before = shards.shard_path(work.prefix, 1).read_bytes()
    with pytest.raises(InputError, match=r"gen0\.jsonl: finished, of another task: temperature \(1\.0, now 0\.5\)"):
        work.run(1, 2, temperature=0.5)
    refused = shards.refused_path(shards.shard_path(work.prefix, 1))
    assert "temperature (1.0, now 0.5)" in refused.read_text()
    assert shards.shard_path(work.prefix, 1).read_bytes() == before
    assert not work.run(1, 2)  # the task that is there
    assert not refused.exists()


def test_overwriting_replaces_a_task_shard_by_shard_and_keeps_the_work_of_the_other_shards(tmp_path):
    work = Work(tmp_path)
    work.run_all(2)
    work.sampled.clear()
    assert work.run_all(2, overwrite=True, temperature=0.5) == [True, True]
    assert sorted(work.sampled) == list(range(TOTAL))
    assert work.output(2) == list(range(TOTAL))
    assert {read_manifest(shards.shard_path(work.prefix, i))["arguments"]["temperature"] for i in range(2)} == {0.5}
    assert not part_files(work.prefix)


def test_a_task_that_replaced_one_of_more_shards_is_up_to_date_and_leaves_none_of_them(tmp_path):
    work = Work(tmp_path)
    work.run_all(5)
    assert work.run_all(2, overwrite=True, temperature=0.5) == [True, True]
    assert list(shards.shard_manifests(work.prefix)) == [0, 1]
    assert work.run_all(2, temperature=0.5) == [False, False]
    assert work.output(2) == list(range(TOTAL))


def test_overwriting_that_died_goes_on_without_the_flag(tmp_path):
    work = Work(tmp_path)
    work.run_all(2)
    with suppress(Died):
        work.run(0, 2, at_most=3, overwrite=True, temperature=0.5)
    work.sampled.clear()
    assert work.run(0, 2, temperature=0.5)
    assert work.sampled == [3, 4, 5]
    with pytest.raises(InputError, match=r"gen1\.jsonl: finished, of another task: temperature"):
        work.run(1, 2, temperature=0.5)
    assert work.run(1, 2, overwrite=True, temperature=0.5)
    assert work.output(2) == list(range(TOTAL))


def test_another_number_of_shards_waits_for_a_program_that_is_at_work(tmp_path):
    work = Work(tmp_path)
    with suppress(Died):
        work.run(0, 3, at_most=1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(work.prefix)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    who = rf" \(process {holder.pid} on {re.escape(socket.gethostname())}, since 20\d\d-[\d: -]+\); wait for it or stop it"
    with pytest.raises(InputError, match="another process is working on shard 1 of 3" + who):
        work.run(0, 2)
    with pytest.raises(InputError, match=r"gen1\.jsonl: another process is working on it" + who):
        work.run(1, 3)
    assert not list(tmp_path.glob("*.refused"))  # nothing old would be taken for it
    work.run(0, 3)  # its neighbour is not in the way
    holder.kill()
    holder.wait()
    work.run_all(2)
    assert sorted(work.sampled) == list(range(TOTAL))


HOLD = """
import sys
from pathlib import Path
from tests.contract.test_shards import Arguments
from baton import shards
stage = shards.begin("sample", Arguments(), Path(sys.argv[1]), 1, 3, {})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_task_that_is_finished_in_part_without_parts_names_the_number_to_go_on_with(tmp_path):
    work = Work(tmp_path)
    work.run_all(3)
    shards.shard_path(work.prefix, 1).unlink()
    with pytest.raises(InputError, match="finished in part, in 3 shards: run the missing ones with --my_world_size 3"):
        work.run(0, 2)
    work.sampled.clear()
    assert work.run_all(3) == [False, True, False]
    assert work.sampled == list(shard_range(TOTAL, 1, 3))


@pytest.mark.parametrize("dies", DEATHS)
def test_a_shard_that_died_while_it_was_finished_is_finished_by_the_same_command(tmp_path, dies):
    work = Work(tmp_path)
    for index in range(2):
        with suppress(Died):
            work.run(index, 2, dies=dies)
    work.run_all(2)
    assert sorted(work.sampled) == list(range(TOTAL))
    assert work.output(2) == list(range(TOTAL))
    assert not part_files(work.prefix) and not list(tmp_path.glob("*.refused")) and not list(tmp_path.glob("*assembled*"))


def test_a_shard_redone_alone_without_parts_keeps_its_number(tmp_path):
    work = Work(tmp_path)
    work.run_all(3)
    shards.shard_path(work.prefix, 1).unlink()
    with suppress(Died):
        work.run(1, 3, at_most=1)
    with pytest.raises(InputError, match="in 3 shards: run the missing ones with --my_world_size 3"):
        work.run(0, 2)
    assert work.run_all(3) == [False, True, False]
    assert sorted(work.sampled) == sorted([*range(TOTAL), *shard_range(TOTAL, 1, 3)])


def test_prefixes_that_continue_each_other_in_digits_are_two_tasks(tmp_path):
    one, ten = Work(tmp_path), Work(tmp_path)
    ten.prefix = tmp_path / "gen1"
    ten.run_all(3, temperature=0.5)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert one.run_all(2) == [True, True]
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.iterdir()}.items()
    assert one.run_all(2) == [False, False] and ten.run_all(3, temperature=0.5) == [False] * 3


def test_a_trainings_unfinished_work_is_never_taken_for_parts(tmp_path):
    checkpoint = tmp_path / "gen.partial/checkpoint-1"
    checkpoint.mkdir(parents=True)
    with pytest.raises(InputError, match=r"gen\.partial: the folder of a training; choose another --output_dir"):
        Work(tmp_path).run(0, 1, overwrite=True)
    assert checkpoint.exists()


def test_a_lock_is_held_by_one_process_until_it_ends(tmp_path):
    path = tmp_path / "lock"
    code = f"from pathlib import Path\nfrom baton.locks import Lock\nprint(Lock(Path({str(path)!r})).take())"

    def taken() -> str:
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    with Lock(path):
        assert taken() == "False"
    assert not path.exists()
    assert taken() == "True"
    with Lock(path):  # the file of a process that ended is in nobody's way
        assert path.exists()


def test_a_file_system_without_locks_is_said_with_its_path_and_what_to_do(tmp_path):
    """The kernel's answer is made up, in the module that passes it on: no file system here gives it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl, os\n"
        "def lockf(*_): raise OSError(number := getattr(errno, os.environ['ANSWER']), os.strerror(number))\n"
        "fcntl.lockf = lockf\n"
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    words = ["tests/contract/small_stage.py", "--dataset_name_or_path", prompts, "--output_dir", tmp_path / "out.jsonl"]
    for answer in ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"):
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "ANSWER": answer}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert f"{tmp_path}/out.jsonl.partial.lock: the file system there has no file locks" in line
        assert "give an output on another file system" in line
