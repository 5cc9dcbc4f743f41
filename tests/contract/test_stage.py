"""What a stage promises, kept by a small program in real processes: resume, refusal, exit codes, accounts."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from baton.arguments import StageArguments, option
from baton.errors import InputError
from baton.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("small_stage.py")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join(orjson.dumps({"prompt": f"prompt {i}", "extra": i}) + b"\n" for i in range(300)))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out [1]*.jsonl"  # characters that mean something to a glob


def start(prompts: Path, output: Path, *flags: str, python: tuple[str, ...] = (), **options) -> subprocess.Popen:
    """Starts the small stage; its stdin stays open until it is waited for."""
    command = [
        sys.executable,
        *python,
        PROGRAM,
        "--dataset_name_or_path",
        prompts,
        "--output_dir",
        output,
        *flags,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), env=environment, text=True, **pipes, **options)


def run(prompts: Path, output: Path, *flags: str, **options) -> tuple[int, str]:
    """Runs the small stage to its end; returns its exit code and its log."""
    process = start(prompts, output, *flags, **options)
    _, log = process.communicate()
    return process.returncode, log


def test_check_says_what_would_be_done_and_does_nothing(prompts: Path, output: Path):
    code, log = run(prompts, output, "--check")
    assert code == 0 and "starting" in log and list(output.parent.iterdir()) == [prompts]
    code, log = run(prompts, output, "--check", "--K", "none")
    assert code == 2 and "`K`" in log
    stop_at(start(prompts, output, "--wait_after", "3"), 3, signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in output.parent.iterdir()}
    code, log = run(prompts, output, "--check")
    assert code == 0 and "going on where it stopped" in log
    code, log = run(prompts, output, "--check", "--K", "2")
    assert code == 2 and "K (1, now 2)" in log
    assert before == {path: path.stat().st_mtime_ns for path in output.parent.iterdir()}
    assert run(prompts, output)[0] == 0
    code, log = run(prompts, output, "--check")
    assert code == 0 and "up to date" in log


def stop_at(process: subprocess.Popen, position: int, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal once the stage has said that the record at `position` is on disk."""
    for line in process.stdout:
        if int(line) >= position:
            break
    process.send_signal(number)
    _, log = process.communicate()
    return process.returncode, log


def records(path: Path) -> list[dict]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def manifest(output: Path) -> dict:
    return orjson.loads(output.with_name(output.name + ".manifest.json").read_bytes())


def files_beside(output: Path) -> set[str]:
    return {path.name.removeprefix(output.name) for path in output.parent.iterdir() if path.name.startswith("out")}


def assert_complete(output: Path, count: int = 300) -> None:
    """Every record exactly once, in input order, and nothing left over."""
    assert [record["extra"] for record in records(output)] == list(range(count))
    assert files_beside(output) == {"", ".manifest.json"}


def test_a_finished_stage_leaves_its_output_and_a_manifest_and_nothing_else(prompts, output):
    code, log = run(prompts, output, "--K", "2")
    assert code == 0, log
    assert_complete(output)
    assert records(output)[7]["responses"] == ["PROMPT 7"] * 2
    written = manifest(output)
    assert written["counts"] == {"in": 300, "out": 300, "dropped": {}}
    assert written["arguments"]["K"] == 2
    assert written["inputs"]["prompts"]["hash"]
    assert "300 in, 300 out" in log.splitlines()[-1]


def test_every_drop_is_counted_and_named(prompts, output):
    code, log = run(prompts, output, "--drop", "9")
    dropped = sum("9" in str(i) for i in range(300))
    assert code == 0
    assert manifest(output)["counts"] == {"in": 300, "out": 300 - dropped, "dropped": {"unwanted": dropped}}
    assert len(manifest(output)["dropped"]["unwanted"]) == dropped
    assert f"300 in, {300 - dropped} out, dropped: {dropped} unwanted" in log.splitlines()[-1]


def test_a_finished_stage_is_up_to_date_and_says_so_before_any_heavy_import(prompts, output):
    run(prompts, output)
    before = output.stat().st_mtime_ns
    code, log = run(prompts, output, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}
    assert code == 0
    assert "up to date" in log
    assert "baton.stage" in imported
    assert not imported & {"pyarrow", "torch", "transformers", "datasets", "vllm", "trl", "scipy"}
    assert output.stat().st_mtime_ns == before


def test_paths_are_no_difference_where_the_content_is_the_same(prompts, output):
    run(prompts, output)
    copy = prompts.with_name("copy.jsonl")
    copy.write_bytes(prompts.read_bytes())
    code, log = run(copy, output)
    assert code == 0
    assert "up to date" in log


def test_an_argument_that_there_was_not_when_a_manifest_was_written_had_its_default(prompts, output):
    run(prompts, output)
    path = output.with_name(output.name + ".manifest.json")
    manifest = orjson.loads(path.read_bytes())
    assert manifest["arguments"].pop("K") == 1
    path.write_bytes(orjson.dumps(manifest))
    assert run(prompts, output)[0] == 0
    assert "K (1, now 3)" in run(prompts, output, "--K", "3")[1]


def test_other_arguments_are_refused_by_name_until_told_to_overwrite(prompts, output):
    run(prompts, output)
    before = output.read_bytes()
    code, log = run(prompts, output, "--K", "3")
    assert code == 2
    assert "K (1, now 3)" in log
    assert output.read_bytes() == before
    assert run(prompts, output, "--K", "3", "--overwrite")[0] == 0
    assert len(records(output)[0]["responses"]) == 3
    assert_complete(output)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_another_input_is_refused_by_name(prompts, output, finished):
    if finished:
        run(prompts, output)
    else:
        stop_at(start(prompts, output), 20, signal.SIGKILL)
    with prompts.open("a") as file:
        file.write('{"prompt": "one more", "extra": 300}\n')
    code, log = run(prompts, output)
    assert code == 2
    assert "prompts: the content of" in log
    assert run(prompts, output, "--overwrite")[0] == 0
    assert_complete(output, 301)


def test_no_stage_that_ends_by_itself_leaves_its_lock(prompts, output):
    stop_at(start(prompts, output, "--wait_after", "9"), 9, signal.SIGINT)
    assert list(output.parent.glob("*.partial")) and not list(output.parent.glob("*.lock"))
    assert run(prompts, output, "--K", "2")[0] == 2  # unfinished work of another task
    assert not list(output.parent.glob("*.lock"))


def test_an_input_that_is_no_longer_given_is_refused_by_name(prompts, output):
    arguments, inputs = StageArguments(), {"data": prompts, "data2": prompts}
    output.touch()
    Stage.begin("mix", StageArguments(overwrite=True), output, inputs).finish(records_in=0, records_out=0)
    output.touch()
    assert Stage.begin("mix", arguments, output, inputs) is None
    with pytest.raises(InputError, match=rf"data2 \({prompts}, now none\)"):
        Stage.begin("mix", arguments, output, {"data": prompts})


class Learning(StageArguments):
    rate: float = option(0.1, "learning rate")
    steps: int = option(1, "steps")


@pytest.mark.parametrize("kept", [None, "rows/data.arrow", "checkpoint-2/model", "reference-logps-1-4096.partial"])
def test_a_run_that_failed_before_it_kept_anything_does_not_block_the_corrected_one(tmp_path, prompts, kept):
    output, wrong = tmp_path / "policy", Learning(rate=1.0, steps=0)
    Stage.begin("dpo", wrong, output, {"data": prompts}, {"beta": 0.1}).lock.release()
    if kept:
        (tmp_path / "policy.partial" / kept).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "policy.partial" / kept).write_text("x")
    prompts.write_text('{"prompt": "another"}\n')

    def corrected():
        return Stage.begin("dpo", Learning(), output, {"data": prompts}, {"beta": 0.2})

    if kept is None or kept.startswith("rows"):
        assert corrected() is not None and not (tmp_path / "policy.partial/rows").exists()
        return
    with pytest.raises(InputError) as refused:
        corrected()
    every = ("rate (1.0, now 0.1)", "steps (0, now 1)", "beta (0.1, now 0.2)", "data: the content of")
    assert all(name in str(refused.value) for name in every)


def test_unfinished_work_is_not_continued_with_other_arguments(prompts, output):
    stop_at(start(prompts, output, "--wait_after", "9"), 9, signal.SIGKILL)
    code, log = run(prompts, output, "--K", "2")
    assert code == 2
    assert "unfinished work of another task: K (1, now 2)" in log
    assert run(prompts, output, "--wait_after", "5")[0] == 0  # what does not change the result may differ
    assert_complete(output)


def test_a_file_that_no_stage_made_is_not_replaced(prompts, output):
    output.write_text("precious")
    code, log = run(prompts, output)
    assert code == 2
    assert "no manifest" in log
    assert output.read_text() == "precious"


def test_a_folder_that_no_stage_made_is_not_replaced_even_when_told_to_overwrite(prompts, output):
    output.mkdir()
    (output / "thesis.tex").write_text("precious")
    assert run(prompts, output, "--overwrite")[0] == 2
    assert (output / "thesis.tex").read_text() == "precious"


def test_what_is_refused_before_an_output_is_overwritten_leaves_it_where_it_is(tmp_path):
    def refuse(stage: Stage) -> None:
        raise InputError("no login")

    output = tmp_path / "policy"
    for path in (output, output.with_name("policy.partial")):
        path.mkdir()
    for path in ("policy.manifest.json", "policy.partial.manifest.json"):
        (tmp_path / path).write_bytes(orjson.dumps({"stage": "small", "arguments": {}, "inputs": {}}))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="no login"):
        Stage.begin("small", StageArguments(overwrite=True), output, {}, check=refuse)
    assert set(tmp_path.rglob("*")) == before


def test_an_output_never_replaces_its_input(prompts):
    before = prompts.read_bytes()
    code, log = run(prompts, prompts, "--overwrite")
    assert code == 2
    assert "cannot replace or hold the input" in log
    assert prompts.read_bytes() == before


def test_overwriting_keeps_the_old_output_under_another_name_until_the_new_one_is_complete(prompts, output):
    run(prompts, output)
    old, kept = output.read_bytes(), output.with_name(output.name + ".old")
    stop_at(start(prompts, output, "--K", "2", "--overwrite", "--wait_after", "9"), 9, signal.SIGKILL)
    assert not output.exists() and kept.read_bytes() == old
    code, log = run(prompts, output)
    assert code == 2
    assert "unfinished work of another task: K (2, now 1)" in log
    assert run(prompts, output, "--K", "2")[0] == 0
    assert_complete(output)
    assert not kept.exists()


@pytest.mark.parametrize("left", ["parts and manifests", "manifest in progress alone"])
def test_a_death_between_the_output_and_its_manifest_is_repaired(prompts, output, left):
    stop_at(start(prompts, output, "--wait_after", "299"), 299, signal.SIGKILL)
    part = output.with_name(output.name + ".partial")
    output.write_bytes(b"".join(line[line.index(b",") + 1 : -2] + b"\n" for line in part.open("rb")))
    if left != "parts and manifests":
        part.unlink()
    code, log = run(prompts, output)
    assert code == 0, log
    assert_complete(output)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_stage_exits_130_and_keeps_what_it_finished(prompts, output, number):
    code, log = stop_at(start(prompts, output, "--wait_after", "150"), 150, number)
    assert code == 130
    assert "interrupted" in log
    process = start(prompts, output)
    out, log = process.communicate()
    assert process.returncode == 0
    assert "going on where it stopped" in log
    assert out.split()[0] == "151"
    assert_complete(output)


def test_a_background_job_of_a_shell_can_be_interrupted(prompts, output):
    ignoring = start(prompts, output, "--wait_after", "5", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert stop_at(ignoring, 5, signal.SIGINT)[0] == 130


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_every_record_is_written_exactly_once_and_in_order(prompts, output, seed):
    generator = random.Random(seed)
    place = -1
    while not output.exists():
        place += generator.randint(10, 120)
        running = start(prompts, output, "--wait_after", str(place + 5))  # so that it is not far ahead of its words
        stop_at(running, place, signal.SIGKILL)
    assert run(prompts, output)[0] == 0  # a kill may have hit between the output and its manifest
    assert_complete(output)


def test_a_second_process_on_the_same_output_is_refused(prompts, output):
    first = start(prompts, output, "--wait_after", "10")
    while int(first.stdout.readline()) != 10:
        pass
    for flags in ((), ("--overwrite",)):
        code, log = run(prompts, output, *flags)
        assert code == 2
        assert f"another process is working on it (process {first.pid} on {socket.gethostname()}, since 20" in log
    assert first.communicate()[1]
    assert first.returncode == 0
    assert_complete(output)


def test_of_many_processes_at_once_one_does_the_work_and_the_others_give_way(prompts, output):
    processes = [start(prompts, output) for _ in range(6)]
    logs = [process.communicate()[1] for process in processes]
    assert sum("starting" in log or "going on" in log for log in logs) == 1, logs
    for process, log in zip(processes, logs, strict=True):
        refused = "another process is working on it" in log
        assert process.returncode == (2 if refused else 0), log
    assert_complete(output)


@pytest.mark.parametrize(
    ("flags", "expected", "message"),
    [
        (("--fail",), 3, "the server refused it"),
        (("--crash",), 1, "ZeroDivisionError: a bug"),
        (("--temprature", "1"), 2, "unknown setting `temprature`"),
        (("--K", "0"), 2, "`K`: input should be greater than or equal to 1"),
        (("--help",), 0, ""),
    ],
    ids=["failures", "bug", "unknown flag", "out of range", "help"],
)
def test_exit_codes(prompts, output, flags, expected, message):
    code, log = run(prompts, output, *flags)
    assert code == expected
    assert message in log
    assert ("Traceback" in log) == (expected == 1)


@pytest.mark.parametrize("place", ["prompts.jsonl/out.jsonl", "x" * 300, "/sys/out.jsonl"], ids=["file", "long", "read-only"])
def test_an_output_where_nothing_can_be_written_is_one_message_with_the_path(prompts, place):
    code, log = run(prompts, prompts.parent / place)
    assert code == 2 and "Traceback" not in log
    assert place.partition("/out")[0] in log and "give another path" in log


def test_bad_input_names_file_and_line_and_leaves_no_output(prompts, output):
    with prompts.open("a") as file:
        file.write("{broken\n")
    code, log = run(prompts, output)
    assert code == 2
    assert f"{prompts}:301" in log
    assert not output.exists()


@pytest.fixture(params=["file system", "file size"])
def small_disk(request, tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 64 KiB, or None to limit the size of a file instead, which no machine forbids."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    wanted = request.param == "file system" and os.geteuid() == 0
    mounted = wanted and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_whole_records_and_a_run_with_space_completes(tmp_path, prompts, small_disk):
    long = ("--K", "30")  # about 100 KiB in all
    output = (small_disk or tmp_path) / "out.jsonl"
    limit = (20_000, 20_000)
    options = {} if small_disk else {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}
    code, log = run(prompts, output, *long, **options)
    assert code == 2, log
    assert "what is written is whole" in log
    assert not output.exists()
    part = output.with_name("out.jsonl.partial").read_bytes()
    assert part.endswith(b"]\n")
    assert [orjson.loads(line)[0] for line in part.splitlines()] == list(range(part.count(b"\n")))
    if small_disk:
        subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    code, log = run(prompts, output, *long)
    assert code == 0, log
    assert "going on where it stopped" in log
    assert_complete(output)
