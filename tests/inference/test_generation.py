"""Offline generation and merging, by the programs that users start, on real vLLM with a tiny policy."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path

import psutil
import pytest

from tests.inference.tiny_policy import TEMPLATE, make_tiny_policy
from tests.programs import ROOT, read_jsonl, run_program, start, succeed, write_jsonl

PROMPTS = [f"the film number {n} was" for n in range(12)] + ["the film number 3 was"]


def program(name: str, *arguments: object, **flags: object) -> list[str]:
    """The words of a generation program's command line, after `python`."""
    words = [str(argument) for argument in arguments]
    for flag, value in flags.items():
        words += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return [str(ROOT / "generation" / name), *words]


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command that is no program of ours, or one that must start as an interpreter of its own."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **{"cwd": ROOT, **options})


def write(path: Path, prompts: list[object]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "n": n}) + "\n" for n, prompt in enumerate(prompts)))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def manifest(path: Path) -> dict:
    return json.loads(Path(f"{path}.manifest.json").read_text())


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def run_of_eight(policy, tmp_path_factory) -> Path:
    """The folder of 8 shards over 13 prompts, merged, as `scripts/test_gen.sh` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    write(folder / "prompts.jsonl", PROMPTS)
    for index in range(8):
        succeed(*shard_of_eight(policy, folder, index))
    assert merge(folder, output="gen_data.jsonl").returncode == 0
    return folder


def shard_of_eight(policy: Path, folder: Path, index: int) -> list[str]:
    return program(
        "get_hf2.py",
        model_name_or_path=policy,
        dataset_name_or_path=folder / "prompts.jsonl",
        output_dir=folder / "gen_data",
        K=4,
        max_new_tokens=60,
        local_index=index,
        my_world_size=8,
    )


def generate_command(policy: Path, folder: Path, shards: int = 8) -> list[str]:
    """The script that does the same with a process for each GPU, one on a CPU."""
    flags = ["--model", policy, "--prompts", folder / "prompts.jsonl", "--output_dir", folder / "gen_data"]
    flags += ["--K", 4, "--max_new_tokens", 60, "--my_world_size", shards]
    return ["bash", str(ROOT / "scripts/test_gen.sh"), *map(str, flags)]


def test_the_script_runs_every_shard_and_merges_them(policy, tmp_path):
    write(tmp_path / "prompts.jsonl", PROMPTS)
    result = run(generate_command(policy, Path(), shards=2), cwd=tmp_path)  # paths are relative to the caller's folder
    assert result.returncode == 0, result.stderr
    assert [record["n"] for record in read(tmp_path / "gen_data.jsonl")] == list(range(13))
    log = (tmp_path / "gen_data0.log").read_text()
    assert re.search(r"runs on: device=\S+ dtype=bfloat16 attention=\S+ tensor_parallel_size=1", log)


def test_eight_shards_over_thirteen_prompts_lose_none_and_merge_in_input_order(run_of_eight):
    records = read(run_of_eight / "gen_data.jsonl")
    assert [record["n"] for record in records] == list(range(13))
    assert [record["prompt"] for record in records] == [[{"role": "user", "content": p}] for p in PROMPTS]
    assert all(len(record["responses"]) == 4 for record in records)
    shards = [read(run_of_eight / f"gen_data{i}.jsonl") for i in range(8)]
    assert list(chain.from_iterable(shards)) == records
    assert all(shards)


def test_ids_are_unique_and_those_of_the_prompt_and_its_ordinal(run_of_eight):
    ids = [record["id"] for record in read(run_of_eight / "gen_data.jsonl")]
    assert len(set(ids)) == 13
    assert ids[12] == f"{ids[3]}-1"


def test_shards_draw_different_random_numbers(run_of_eight):
    records = read(run_of_eight / "gen_data.jsonl")
    assert len({response for record in records for response in record["responses"]}) > 50


def test_token_ids_decode_to_the_text_and_end_of_turn_stands_only_where_the_policy_stopped(policy, run_of_eight):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    reasons = set()
    for record in read(run_of_eight / "gen_data.jsonl"):
        samples = zip(record["responses"], record["response_token_ids"], record["finish_reasons"], strict=True)
        for text, ids, reason in samples:
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert decoded.startswith(text)
            assert set(decoded[len(text) :]) <= {"\ufffd"}  # a character that was cut off by length
            assert tokenizer.eos_token_id not in ids[:-1]
            assert (ids[-1] == tokenizer.eos_token_id) == (reason == "stop")
            assert reason == "stop" or len(ids) == 60
            reasons.add(reason)
    assert reasons == {"stop", "length"}


def test_the_manifests_account_for_every_prompt_and_token(run_of_eight):
    records = read(run_of_eight / "gen_data.jsonl")
    tokens = sum(len(ids) for record in records for ids in record["response_token_ids"])
    merged = manifest(run_of_eight / "gen_data.jsonl")
    assert (merged["prompts"], merged["tokens"]) == (13, tokens)
    assert sum(manifest(run_of_eight / f"gen_data{i}.jsonl")["counts"]["in"] for i in range(8)) == 13


def test_a_second_run_is_up_to_date_and_imports_no_engine(policy, run_of_eight):
    before = {path: path.stat().st_mtime_ns for path in run_of_eight.glob("*.jsonl")}
    result = run([sys.executable, "-X", "importtime", *shard_of_eight(policy, run_of_eight, 2)])
    assert result.returncode == 0
    assert "up to date" in result.stderr
    assert not imported(result.stderr) & {"vllm", "torch", "transformers"}
    assert run(generate_command(policy, run_of_eight)).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in run_of_eight.glob("*.jsonl")}


def imported(importtime: str) -> set[str]:
    """The top-level packages in the output of `python -X importtime`."""
    return {line.split("|")[-1].strip().split(".")[0] for line in importtime.splitlines() if line.startswith("import time")}


def test_killed_at_five_points_and_started_again_every_prompt_is_there_once(policy, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [f"film {n}" for n in range(300)])
    output = tmp_path / "gen_data0.jsonl"
    command = program(
        "get_hf2.py",
        model_name_or_path=policy,
        dataset_name_or_path=prompts,
        output_dir=tmp_path / "gen_data",
        K=4,
        max_new_tokens=100,
        max_num_seqs=16,
    )
    points = sorted(random.Random(0).sample(range(1, 250), 5))
    for point in points:
        process = start(*command)
        while process.exitcode is None and finished_lines(tmp_path / "gen_data.partial0-of-1") < point:
            process.join(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it was killed"
        psutil.wait_procs(children, timeout=10)
        assert not any(child.is_running() for child in children)
        assert not output.exists()
    with (tmp_path / "gen_data.partial0-of-1").open("ab") as partial:
        partial.write(b'[299,{"id": "half a rec')
    succeed(*command)
    records = read(output)
    assert [record["n"] for record in records] == list(range(300))
    assert all(len(record["responses"]) == 4 for record in records)
    assert manifest(output)["tokens"] == sum(len(ids) for r in records for ids in r["response_token_ids"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "prompts.jsonl", "gen_data0.jsonl", "gen_data0.jsonl.manifest.json"
    }  # fmt: skip


def finished_lines(part: Path) -> int:
    return part.read_bytes().count(b"\n") if part.exists() else 0


def test_killed_in_three_shards_and_finished_in_two_nothing_is_sampled_twice_and_the_tokens_are_the_same(policy, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [f"film {n}" for n in range(60)])
    flags = {"model_name_or_path": policy, "dataset_name_or_path": prompts, "K": 2, "max_new_tokens": 40, "max_num_seqs": 4}
    flags |= {"dtype": "float32"}
    once, again = tmp_path / "once", tmp_path / "again"
    succeed(*program("get_hf2.py", "--reproducible", output_dir=once, **flags))
    for index in (0, 2):
        process = start(*program("get_hf2.py", "--reproducible", output_dir=again, local_index=index, my_world_size=3, **flags))
        while process.exitcode is None and finished_lines(tmp_path / f"again.partial{index}-of-3") < 5:
            process.join(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was done before it was killed"
    kept = {}
    for part in tmp_path.glob("again.partial?-of-3"):
        lines = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"]\n")]
        kept |= {int(line[1 : line.index(b",")]): line[line.index(b",") + 1 : -2] for line in lines}
    assert 10 <= len(kept) < 40
    logs = [
        succeed(*program("get_hf2.py", "--reproducible", output_dir=again, local_index=index, my_world_size=2, **flags)).stderr
        for index in (0, 1)
    ]
    merged = program("merge_data.py", base_path=again, output_dir=tmp_path / "again.jsonl", num_datasets=3)
    assert "finished in 2 shards" in succeed(*merged).stderr
    assert all("going on where it stopped" in log for log in logs)
    lines = (tmp_path / "again.jsonl").read_bytes().splitlines()
    assert {position: lines[position] for position in kept} == kept
    assert [record["n"] for record in read(tmp_path / "again.jsonl")] == list(range(60))
    assert read(tmp_path / "again.jsonl") == read(tmp_path / "once0.jsonl")
    up_to_date = succeed(*program("get_hf2.py", "--reproducible", output_dir=again, local_index=4, my_world_size=5, **flags))
    assert "up to date: the task is finished in 2 shards" in up_to_date.stderr


def test_a_second_iteration_with_the_same_paths_is_not_merged_into_the_first_ones_data(policy, tmp_path):
    """The lines of Online-RLHF's test_gen.sh, started with `&` and `wait`, which hides a shard that refuses."""
    prompts = write(tmp_path / "prompts.jsonl", PROMPTS[:4])
    (tmp_path / "second").mkdir()
    second = write(tmp_path / "second/prompts.jsonl", PROMPTS[4:8])
    flags = {"model_name_or_path": policy, "output_dir": tmp_path / "gen_data", "K": 1, "max_new_tokens": 4, "my_world_size": 2}
    for index in (0, 1):
        succeed(*program("get_hf2.py", dataset_name_or_path=prompts, local_index=index, **flags))
    assert merge(tmp_path, 2).returncode == 0
    for index in (0, 1):
        refused = run_program(*program("get_hf2.py", dataset_name_or_path=second, local_index=index, **flags))
        assert refused.returncode == 2
    result = merge(tmp_path, 2)
    assert result.returncode == 2
    of_another = r"gen_data0\.jsonl: .*refused .*prompts: \S+/second/prompts\.jsonl is not \S+/prompts\.jsonl"
    assert re.search(of_another, result.stderr)
    advice = f"to keep it, give another --output_dir, such as {tmp_path}/gen_data_2; to replace it, add --overwrite"
    assert advice in result.stderr
    for index in (0, 1):  # the first iteration's own lines, and then others that are refused before the task is known
        succeed(*program("get_hf2.py", dataset_name_or_path=prompts, local_index=index, **flags))
    assert "up to date" in merge(tmp_path, 2).stderr
    for mistake in (["--model_name_or_path", "./nowhere"], ["--temperatur", "0.5"]):
        assert run_program(*program("get_hf2.py", dataset_name_or_path=second, **flags), *mistake).returncode == 2
        assert re.search(r"gen_data0\.jsonl: .*refused .*(nowhere|temperature)", merge(tmp_path, 2).stderr)
    for index in (0, 1):
        succeed(*program("get_hf2.py", "--overwrite", dataset_name_or_path=second, local_index=index, **flags))
    assert "the content of" in merge(tmp_path, 2).stderr  # the merged file is the first iteration's
    succeed(*merge_command(tmp_path, 2), "--overwrite")
    assert [record["n"] for record in read(tmp_path / "gen_data.json")] == [0, 1, 2, 3]
    assert read(tmp_path / "gen_data.json")[0]["prompt"][0]["content"] == PROMPTS[4]


def finished_sampling(policy: Path, folder: Path) -> list[object]:
    """The call of a sampling that is finished but not merged, made without an engine: a response to each of two prompts."""
    from baton import shards
    from generation.arguments import prompt_inputs
    from generation.get_hf2 import Arguments

    prompts, prefix = write(folder / "prompts.jsonl", PROMPTS[:2]), folder / "gen_data"
    flags = {"model_name_or_path": str(policy), "dataset_name_or_path": str(prompts), "output_dir": str(prefix)}
    flags |= {"K": 1, "backend": "hf", "min_new_tokens": 8, "max_new_tokens": 8}
    arguments = Arguments(**flags)
    stage = shards.begin("generate", arguments, prefix, 0, 1, {**prompt_inputs(arguments), "model": policy})
    write_jsonl(stage.assembled, [{"prompt": prompt, "responses": ["a joy"]} for prompt in PROMPTS[:2]])
    stage.finish(records_in=2, records_out=2, prompts=2, tokens=4)
    return ["generation/run_shards.py", *(word for flag, value in flags.items() for word in (f"--{flag}", value))]


def test_a_mistyped_call_or_check_does_not_lock_a_finished_sampling(policy, tmp_path):
    call, refused = finished_sampling(policy, tmp_path), tmp_path / "gen_data0.jsonl.refused"
    mistyped = [*call, "--temperatur", "0.5"]
    assert run_program(*mistyped, "--check").returncode == 2
    assert not refused.exists()
    assert run_program(*mistyped).returncode == 2
    assert refused.exists()
    assert "up to date" in succeed(*call, "--check").stderr
    assert refused.exists()  # looking changes nothing
    succeed(*call)
    assert [record["responses"] for record in read(tmp_path / "gen_data.jsonl")] == [["a joy"]] * 2
    assert not refused.exists()


def test_overwriting_samples_and_merges_what_is_finished_afresh(policy, tmp_path):
    call = finished_sampling(policy, tmp_path)
    succeed(*call)
    succeed(*call, "--overwrite")
    assert [len(ids) for record in read(tmp_path / "gen_data.jsonl") for ids in record["response_token_ids"]] == [8, 8]
    assert "shard 0 of" not in succeed(*call, "--overwrite", "false").stderr  # nothing is started


def test_a_forked_engine_process_dies_with_its_program(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import os, signal\n"
        "from generation.engine import prepare_environment\n"
        "prepare_environment()\n"
        "if os.fork() == 0:\n"
        "    print('started', flush=True)\n"
        "    signal.pause()\n"
        "os.wait()\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "started\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == ""  # the end of the pipe: the last process that held it is gone


def test_stop_strings_extra_end_tokens_and_prompts_beyond_the_context(policy, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", ["short", "the film " * 200, "also short"])
    command = program(
        "get_hf2.py",
        model_name_or_path=policy,
        dataset_name_or_path=prompts,
        output_dir=tmp_path / "gen",
        K=64,
        max_new_tokens=80,
        max_model_len=128,
        stop=["e", "o"],
        eos_ids=[30, 31, 32],
    )
    result = succeed(*command)
    records = read(tmp_path / "gen0.jsonl")
    assert [record["n"] for record in records] == [0, 2]
    responses = [response for record in records for response in record["responses"]]
    assert len(responses) == 128
    assert not any("e" in response or "o" in response for response in responses)
    ends = {ids[-1] for record in records for ids in record["response_token_ids"]}
    assert ends & {30, 31, 32}
    account = manifest(tmp_path / "gen0.jsonl")
    assert account["counts"]["dropped"] == {"prompt longer than the context of 128 tokens": 1}
    assert f"{prompts}:2" in str(account["dropped"])
    assert f"{prompts}:2" in result.stderr


def test_more_shards_than_prompts_make_finished_empty_files_without_an_engine(policy, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", ["only one"])
    command = program(
        "get_hf2.py",
        model_name_or_path=policy,
        dataset_name_or_path=prompts,
        output_dir=tmp_path / "gen",
        local_index=0,
        my_world_size=3,
    )
    result = run([sys.executable, "-X", "importtime", *command])
    assert result.returncode == 0
    assert (tmp_path / "gen0.jsonl").read_bytes() == b""
    assert manifest(tmp_path / "gen0.jsonl")["counts"] == {"in": 0, "out": 0, "dropped": {}}
    assert "vllm" not in imported(result.stderr)


BAD_PROMPTS = {
    "not JSON": ('{"prompt": "a"}\n{"prompt": \n', r"prompts\.jsonl:2: not JSON"),
    "not an object": ('{"prompt": "a"}\n[1]\n', r"prompts\.jsonl:2: expected a JSON object"),
    "no prompt": (
        '{"prompt": "a"}\n{"text": "b"}\n',
        r"prompts\.jsonl:2: the record has no `prompt`.*--dataset_key",
    ),
    "empty prompt": ('{"prompt": " "}\n', r"prompts\.jsonl:1: `prompt` is empty"),
    "message without role": ('{"prompt": [{"content": "a"}]}\n', r"prompts\.jsonl:1: .*`role`"),
    "empty file": ("", r"prompts\.jsonl: holds no records"),
    "a role that the template refuses": (
        '{"prompt": "a"}\n{"prompt": [{"role": "tool", "content": "b"}]}\n',
        r"prompts\.jsonl:2: the chat template cannot take this conversation: no tool messages",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_bad_prompts_are_named_by_line_before_an_engine_starts(policy, tmp_path, text, message):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(text)
    refused(policy, prompts, tmp_path, message)
    write(prompts, [])
    prompts.write_text('{"text": "mended"}\n')
    refused(policy, prompts, tmp_path, "the record has no `prompt`")  # and no word of unfinished work


BAD_FLAGS = {
    "shard beyond the last": (["--local_index", "8", "--my_world_size", "8"], "must be within 0..7"),
    "negative shard": (["--local_index", "-1"], "`local_index`"),
    "no shard": (["--my_world_size", "0"], "`my_world_size`"),
    "unknown flag": (["--max_new_token", "8"], "did you mean `max_new_tokens`"),
    "a word for a number": (["--K", "many"], "`K`.*'many'"),
    "no response": (["--K", "0"], "`K`"),
    "negative temperature": (["--temperature", "-1"], "`temperature`"),
    "top_p of nothing": (["--top_p", "0"], "`top_p`"),
    "no such model": (["--model_name_or_path", "./nowhere/model"], r"\./nowhere/model: no such folder"),
    "no such prompts": (["--dataset_name_or_path", "./nowhere.jsonl"], r"nowhere\.jsonl: no such file"),
    "unknown split setting": (["--dataset_slit", "test"], "did you mean `dataset_split`"),
    "no such template": (["--chat_template", "./nowhere.jinja"], r"--chat_template ./nowhere\.jinja"),
    "a folder for a prefix": (["--output_dir", "./"], "--output_dir ./: give the beginning of file names"),
    "an end id beyond the vocabulary": (["--eos_ids", "128009"], r"--eos_ids 128009: no token of \S+, which has \d+"),
    "no such dtype": (["--dtype", "int4"], "`dtype`.*float32"),
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_named_before_an_engine_starts(policy, tmp_path, flags, message):
    refused(policy, write(tmp_path / "prompts.jsonl", ["a"]), tmp_path, message, *flags)


@pytest.mark.parametrize("check", [(), ("--check",)], ids=["at work", "check"])
def test_a_hub_model_that_cannot_be_had_is_one_message_of_the_samplers_and_scorers(tmp_path, check):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]}) + "\n")
    for program, flag in (
        ("generation/get_hf2.py", ["--model_name_or_path", "some/model"]),
        ("annotate_data/get_rewards.py", ["--scorer", "bt:some/model"]),
        ("annotate_data/get_logps.py", ["--models", "policy=some/model"]),
    ):
        words = [program, "--dataset_name_or_path", data, "--output_dir", tmp_path / Path(program).stem, *flag, *check]
        with socket.socket() as nobody:  # bound, so that nothing else answers there, and not listening
            nobody.bind(("127.0.0.1", 0))
            hub = {"HF_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}", "HF_HUB_CACHE": str(tmp_path / "hub")}
            done = run([sys.executable, *map(str, words)], env=os.environ | hub | {"HF_HUB_OFFLINE": "0"})
        assert done.returncode == (0 if check else 2), done.stderr  # ahead of the work a warning: the hub may answer by then
        assert "some/model: neither a folder here nor in the hub's cache" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unknown_key_in_the_yaml_file_is_named(policy, tmp_path):
    (tmp_path / "generate.yaml").write_text("temperatur: 0.7\n")
    result = run_program(*program("get_hf2.py", tmp_path / "generate.yaml", model_name_or_path=policy))
    assert result.returncode == 2
    assert "did you mean `temperature`" in result.stderr


def refused(policy: Path, prompts: Path, folder: Path, message: str, *flags: str) -> None:
    """Assert exit code 2, the message on one line, no engine started and no output."""
    command = program(
        "get_hf2.py",
        "--model_name_or_path",
        policy,
        "--dataset_name_or_path",
        prompts,
        "--output_dir",
        folder / "gen",
        *flags,
    )
    result = run_program(*command)
    assert result.returncode == 2, result.stderr
    assert re.search(f"ERROR .*{message}", result.stderr), result.stderr
    assert "runs on" not in result.stderr
    assert not list(folder.glob("gen*.jsonl"))


def test_a_full_disk_leaves_whole_records_and_the_run_goes_on_afterwards(policy, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [f"film {n}" for n in range(40)])
    command = program(
        "get_hf2.py",
        model_name_or_path=policy,
        dataset_name_or_path=prompts,
        output_dir=tmp_path / "gen",
        K=4,
        max_new_tokens=40,
    )
    result = run([sys.executable, *command], preexec_fn=limit_file_size)
    assert result.returncode == 2, result.stderr
    assert "free some space" in result.stderr
    kept = finished_lines(tmp_path / "gen.partial0-of-1")
    assert 0 < kept < 40
    succeed(*command)
    assert [record["n"] for record in read(tmp_path / "gen0.jsonl")] == list(range(40))


def limit_file_size() -> None:
    """What a full disk does to a program: no file grows beyond 10 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


@pytest.fixture
def shards(run_of_eight, tmp_path) -> Path:
    """A copy of the eight shards, not yet merged."""
    for path in run_of_eight.glob("gen_data[0-9].jsonl*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def merge_command(folder: Path, num_datasets: int = 8, output: str = "gen_data.json") -> list[str]:
    return program("merge_data.py", base_path=folder / "gen_data", output_dir=folder / output, num_datasets=num_datasets)


def merge(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return run_program(*merge_command(*arguments, **options))


def change_manifest(path: Path, **arguments: object) -> None:
    content = manifest(path)
    content["arguments"] |= arguments
    Path(f"{path}.manifest.json").write_text(json.dumps(content))


def assert_merge_refused(folder: Path, message: str, num_datasets: int = 8) -> None:
    result = merge(folder, num_datasets)
    assert result.returncode == 2, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert not (folder / "gen_data.json").exists()


def test_merging_copies_the_shards_and_is_up_to_date_afterwards(shards, run_of_eight):
    assert merge(shards).returncode == 0
    assert (shards / "gen_data.json").read_bytes() == (run_of_eight / "gen_data.jsonl").read_bytes()
    assert "up to date" in merge(shards).stderr


def test_merging_names_a_missing_shard(shards):
    (shards / "gen_data5.jsonl").unlink()
    assert_merge_refused(shards, r"gen_data5\.jsonl: missing")


def test_merging_names_an_unfinished_shard(shards):
    (shards / "gen_data5.jsonl").rename(shards / "gen_data.partial5-of-8")
    shutil.copy(shards / "gen_data5.jsonl.manifest.json", shards / "gen_data.partial.manifest.json")
    assert_merge_refused(shards, r"gen_data5\.jsonl: unfinished")


def test_merging_names_a_shard_of_a_run_with_other_arguments(shards):
    change_manifest(shards / "gen_data5.jsonl", temperature=0.5)
    assert_merge_refused(shards, r"gen_data5\.jsonl: of another task .* temperature \(0\.5, not 1\.0\)")


def test_merging_names_a_shard_of_other_prompts(shards):
    content = manifest(shards / "gen_data5.jsonl")
    content["inputs"]["prompts"]["hash"] = "0"
    (shards / "gen_data5.jsonl.manifest.json").write_text(json.dumps(content))
    assert_merge_refused(shards, r"gen_data5\.jsonl: of another task .* content of prompts")


def test_merging_fewer_shards_than_were_made_is_refused(shards):
    for name in ("gen_data7.jsonl", "gen_data7.jsonl.manifest.json"):
        (shards / name).unlink()
    assert_merge_refused(shards, "shard 0 of 8, taken for shard 0 of 7", num_datasets=7)


@pytest.mark.parametrize("number", [1, 7, 9])
def test_merging_takes_all_shards_of_a_finished_task_whatever_number_is_given(shards, run_of_eight, number):
    result = merge(shards, number)
    assert result.returncode == 0, result.stderr
    assert "the task was finished in 8 shards, so these are merged" in result.stderr
    assert (shards / "gen_data.json").read_bytes() == (run_of_eight / "gen_data.jsonl").read_bytes()


def test_merging_names_a_shard_that_was_cut(shards):
    lines = (shards / "gen_data5.jsonl").read_bytes().splitlines(keepends=True)
    (shards / "gen_data5.jsonl").write_bytes(b"".join(lines[:-1]))
    assert_merge_refused(shards, rf"gen_data5\.jsonl: {len(lines) - 1} lines, but {len(lines)} in its manifest")
    (shards / "gen_data5.jsonl").write_bytes(b"".join(lines))
    assert merge(shards).returncode == 0  # once the shard is whole again, nothing of the first try stands in the way


def test_merging_names_a_shard_without_manifest_among_others(shards):
    (shards / "gen_data5.jsonl.manifest.json").unlink()
    assert_merge_refused(shards, r"gen_data5\.jsonl: has no manifest")


def test_shards_of_another_toolkit_are_merged_as_they_are(tmp_path):
    (tmp_path / "gen_data0.jsonl").write_text('{"prompt": "a", "responses": ["b"]}\n')
    (tmp_path / "gen_data1.jsonl").write_text("")
    (tmp_path / "gen_data2.jsonl").write_text('{"prompt": "c", "responses": ["d"]}')
    result = merge(tmp_path, 3)
    assert result.returncode == 0, result.stderr
    assert [record["prompt"] for record in read(tmp_path / "gen_data.json")] == ["a", "c"]


def test_shards_of_another_toolkit_in_a_folder_of_their_own_are_merged(tmp_path):
    for index in range(2):
        (tmp_path / f"{index}.jsonl").write_text('{"prompt": "a", "responses": ["b"]}\n')
    merged = program("merge_data.py", base_path=f"{tmp_path}/", output_dir=tmp_path / "all.jsonl", num_datasets=2)
    succeed(*merged)
    assert len(read(tmp_path / "all.jsonl")) == 2


def test_a_full_disk_while_merging_leaves_no_output_and_the_next_merge_is_whole(shards, run_of_eight):
    result = run([sys.executable, *merge_command(shards)], preexec_fn=limit_file_size)
    assert result.returncode == 2, result.stderr
    assert "free some space" in result.stderr
    assert not (shards / "gen_data.json").exists()
    assert merge(shards).returncode == 0
    assert (shards / "gen_data.json").read_bytes() == (run_of_eight / "gen_data.jsonl").read_bytes()


def test_what_is_wrong_with_a_later_set_of_the_same_process_is_said_in_its_own_turn(monkeypatch):
    from baton.launch import chain as stages
    from generation import run_shards

    good = ["--model_name_or_path", "some/model", "--dataset_name_or_path", "prompts.jsonl", "--output_dir"]
    sets = [[*good, "data/second"], ["--output_dir", "data/third", "--local_index", "0"], [*good, "data/fourth"]]
    monkeypatch.setattr(stages, "FOLLOWING", [[run_shards.__file__, *words] for words in sets])
    own = run_shards.sampling_of([*good, "data/first"])
    assert [each.merged for each in run_shards.following_sets(own)] == ["data/second.jsonl"]


def test_a_failed_shard_fails_the_script_with_its_log(policy, tmp_path):
    write(tmp_path / "prompts.jsonl", ["a", "b"])
    result = run([*generate_command(policy, tmp_path), "--chat_template", "nowhere.jinja"])
    assert result.returncode == 2
    assert "nowhere.jinja" in result.stderr
    assert not (tmp_path / "gen_data.jsonl").exists()


def test_the_scripts_settings_may_stand_in_the_yaml_file_and_flags_override_them(tmp_path):
    config, prompts = tmp_path / "config.yaml", write(tmp_path / "prompts.jsonl", ["a", "b"])
    lines = [f"dataset_name_or_path: {prompts}", "model_name_or_path: ./nowhere/model", f"output_dir: {tmp_path / 'responses'}"]
    config.write_text("\n".join([*lines, "my_world_size: 3", "tensor_parallel_size: 1", "overwrite: true"]))
    result = run(["bash", str(ROOT / "scripts/test_gen.sh"), str(config)])
    assert result.returncode == 2
    assert f"shard 0 of 3: failed with exit code 2; the end of {tmp_path / 'responses0.log'}:" in result.stderr
    result = run(["bash", str(ROOT / "scripts/test_gen.sh"), str(config), "--my_world_size", "2"])
    assert "shard 0 of 2: failed" in result.stderr
    config.write_text("my_world_size: none\n")
    result = run(["bash", str(ROOT / "scripts/test_gen.sh"), str(config)])
    assert result.returncode == 2 and "--my_world_size must be a positive number, not 'none'" in result.stderr


def test_a_template_from_a_file_replaces_the_models_own(policy, tmp_path):
    from baton.models.templates import load_tokenizer, prompt_token_ids

    (tmp_path / "shout.jinja").write_text(TEMPLATE.replace("message.content", "message.content | upper"))
    tokenizer = load_tokenizer(str(policy), str(tmp_path / "shout.jinja"))
    ids = prompt_token_ids(tokenizer, [{"role": "user", "content": "abc"}], "here")
    assert tokenizer.decode(ids) == "<|user|>ABC<|end|><|assistant|>"


def test_a_stage_samples_the_same_whether_or_not_an_earlier_one_in_its_process_has_started_the_engine(policy, tmp_path):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"number {i}"} for i in range(6)])
    words = ["generation/get_hf2.py", "--model_name_or_path", policy, "--dataset_name_or_path", prompts, "--K", 2]
    words += ["--max_new_tokens", 8, "--seed"]
    alone = run_program(*words, 7, "--output_dir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr

    (tmp_path / "chain").mkdir()
    (tmp_path / "chain/go").touch()
    both = tmp_path / "both.py"
    both.write_text(
        "import sys\nfrom baton import program\nfrom baton.launch import chain\nprogram.run(lambda: chain.run(sys.argv[1:]))\n"
    )
    first = [*words, 3, "--response_logps", "--output_dir", tmp_path / "first"]
    stages = [first, [*words, 7, "--output_dir", tmp_path / "second"]]
    given = [word for stage in stages for word in (tmp_path / "log", len(stage), *stage)]
    done = run_program(both, *given, env=os.environ | {"BATON_CHAIN": str(tmp_path / "chain")})
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, log
    assert log.count("Loading safetensors checkpoint shards: 100%") == 1 and log.count("runs on: ") == 2
    outputs = [read_jsonl(tmp_path / f"{name}0.jsonl") for name in ("first", "second", "alone")]
    first, second, separate = ([record["response_token_ids"] for record in output] for output in outputs)
    assert second == separate != first


@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_no_response_ends_before_its_least_number_of_tokens(policy, tmp_path, backend):
    flags = {"model_name_or_path": policy, "dataset_name_or_path": write(tmp_path / "prompts.jsonl", PROMPTS[:2]), "K": 32}
    flags |= {"max_new_tokens": 24, "stop": ["e", "o"], "eos_ids": list(range(30, 90)), "dtype": "float32", "backend": backend}
    succeed(*program("get_hf2.py", "--response_logps", output_dir=tmp_path / "gen", min_new_tokens=12, **flags))
    samples = [
        sample
        for record in read(tmp_path / "gen0.jsonl")
        for sample in zip(record["response_token_ids"], record["finish_reasons"], record["response_logps"], strict=True)
    ]
    assert all(12 <= len(ids) <= 24 and len(ids) == len(logps) for ids, _, logps in samples)
    assert not any(set(range(30, 90)) & set(ids[:12]) for ids, _, _ in samples)
    assert sum(reason == "stop" for _, reason, _ in samples) > 32  # afterwards most responses end soon
    assert all(-20 < logp <= 0 for _, _, logps in samples for logp in logps)  # of the distribution without the ends


def test_with_transformers_a_long_prompt_does_not_cut_off_the_responses_to_its_neighbours(policy, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", ["film " * 230, *PROMPTS[:2]])
    flags = {"model_name_or_path": policy, "dataset_name_or_path": prompts, "K": 4, "max_new_tokens": 60, "dtype": "float32"}
    succeed(*program("get_hf2.py", output_dir=tmp_path / "gen", backend="hf", **flags))
    long, *others = read(tmp_path / "gen0.jsonl")
    assert max(map(len, long["response_token_ids"])) < 30  # all that the context of 256 tokens has room for
    assert [max(map(len, record["response_token_ids"])) for record in others] == [60, 60]


def test_what_a_model_needs_beyond_the_defaults_is_refused_unless_it_is_requested(policy, tmp_path):
    model, ran, tokenized = tmp_path / "model", tmp_path / "ran", tmp_path / "tokenized"
    shutil.copytree(policy, model)
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["Own"],
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.Own"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = C\n"
    )
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "words.Words"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "words.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(tokenized)!r}).touch()\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
    )
    flags = {"dataset_name_or_path": write(tmp_path / "prompts.jsonl", PROMPTS[:2]), "output_dir": tmp_path / "gen", "K": 1}
    flags |= {"max_new_tokens": 4, "dtype": "float32"}
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for model_, words, message in (
        (model, ["--backend", "hf"], "trust_remote_code"),
        (model, ["--backend", "vllm"], "trust_remote_code"),
        (policy, ["--backend", "hf", "--quantization", "fp8"], "--backend hf does not support --quantization"),
        (policy, ["--backend", "vllm", "--quantization", "int0"], "int0"),
        (policy, ["--min_new_tokens", "5"], "--min_new_tokens 5 is above --max_new_tokens 4"),
    ):
        refused = run_program(*program("get_hf2.py", *words, model_name_or_path=model_, **flags), env=env)
        assert refused.returncode == 2
        assert message in refused.stderr and "Traceback" not in refused.stderr
    chat = ["generation/chat.py", model, "--backend", "hf", "--dtype", "float32"]
    assert "its tokenizer cannot be loaded" in run_program(*chat, env=env).stderr
    assert not ran.exists() and not tokenized.exists()
    words = ["--backend", "hf", "--trust_remote_code"]
    done = run_program(*program("get_hf2.py", *words, model_name_or_path=model, **flags), env=env)
    assert done.returncode == 0, done.stderr
    assert ran.exists() and tokenized.exists()
    tokenized.unlink()
    done = run_program(*chat, "--trust_remote_code", env=env)  # with nothing asked
    assert done.returncode == 0, done.stderr
    assert tokenized.exists()


def test_the_best_of_n_responses_is_written_and_the_others_are_counted(policy, tmp_path):
    write(tmp_path / "prompts.jsonl", PROMPTS[:6])
    (tmp_path / "rules.py").write_text(
        "def brevity(prompts, responses, records):\n    return [-len(text) for text in responses]\n"
    )
    words = ["bash", ROOT / "scripts/best_of_n.sh", policy, "prompts.jsonl", "best.jsonl", "--n", 4, "--scorer"]
    words += ["function:rules.py:brevity", "--iter", 1, "--rollout_batch_size", 2, "--max_new_tokens", 12]
    words += ["--backend", "hf", "--dtype", "float32", "--", "--workers", 1]
    command = list(map(str, words))
    planned = run([*command[:-3], "--check"], cwd=tmp_path)
    assert planned.returncode == 0 and "3 stages, 0 of them up to date" in planned.stdout, planned.stderr
    done = run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "responses left out: 6 of 8" in done.stderr
    scored = read(tmp_path / "best.jsonl.stages/data_with_rewards.jsonl")
    for all_, best in zip(scored, read(tmp_path / "best.jsonl"), strict=True):
        index = all_["rewards"].index(max(all_["rewards"]))
        for key in ("responses", "response_token_ids", "finish_reasons", "rewards"):
            assert best[key] == [all_[key][index]]
        assert (best["id"], best["best_of"]) == (all_["id"], 4)
    assert manifest(tmp_path / "best.jsonl")["responses_left_out"] == 6
    for missing in (["--n", "4"], ["--scorer", "function:rules.py:brevity"]):
        assert run([*command[:5], *missing], cwd=tmp_path).returncode == 2
