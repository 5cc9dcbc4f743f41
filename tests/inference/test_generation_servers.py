"""Generation through servers: register_server.sh and gen_hf.py on real vLLM, and on a server that misbehaves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from baton.errors import InputError
from baton.launch.processes import identify, is_alive
from baton.servers import processes
from tests.environments import made_for
from tests.inference.misbehaving_server import MisbehavingServer
from tests.inference.tiny_policy import make_tiny_policy
from tests.programs import ROOT, run_program, start

REGISTER = ["bash", str(ROOT / "generation/register_server.sh")]


def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, **options)


def gen_hf(prompts: Path, *arguments: object) -> list[object]:
    """The words of a command line, after `python`."""
    output = prompts.with_name("gen_data.jsonl")
    return ["generation/gen_hf.py", "--dataset_name_or_path", prompts, "--output_dir", output, *arguments]


def write(folder: Path, count: int) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"film {n}", "n": n}) + "\n" for n in range(count)))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def assert_each_prompt_once(output: Path, count: int, K: int) -> None:
    records = read(output)
    assert [record["n"] for record in records] == list(range(count))
    assert all(len(record["responses"]) == K for record in records)


def finished_lines(output: Path) -> int:
    partial = Path(f"{output}.partial")
    return partial.read_bytes().count(b"\n") if partial.exists() else 0


def wait_for_lines(process: subprocess.Popen, output: Path, lines: int) -> None:
    """Wait until `lines` prompts are on disk; the process must still be at work then."""
    while finished_lines(output) < lines:
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"it ended first, with exit code {process.returncode}")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"))


class Pair:
    """Two real servers on ports that were free, in a folder of their own."""

    def __init__(self, policy: Path, folder: Path):
        self.policy, self.folder = policy, folder
        self.env = {**os.environ, "BATON_SERVERS": str(folder)}
        self.ports = two_free_ports()

    def register(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run([*REGISTER, *arguments], env=self.env)

    def start(self, count: int = 2, logprobs_mode: str = "processed_logprobs") -> subprocess.CompletedProcess[str]:
        options = ["--num_servers", count, "--port", self.ports[0], "--max_model_len", 200]
        return self.register(self.policy, *options, "--", "--disable-log-stats", "--logprobs-mode", logprobs_mode)

    def kill(self, port: int) -> None:
        """kill -9 of a server's whole process group."""
        pid = int((self.folder / f"{port}.pid").read_text().split()[0])
        os.killpg(pid, signal.SIGKILL)


def two_free_ports() -> tuple[int, int]:
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port, port + 1


@pytest.fixture(scope="module")
def pair(policy, tmp_path_factory):
    servers = Pair(policy, tmp_path_factory.mktemp("servers"))
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(servers.start, (2, 2)))  # at once: see the first test
    try:
        assert results[0].returncode == 0 or results[1].returncode == 0, results[0].stderr + results[1].stderr
        servers.results = results
        yield servers
    finally:
        stopped = servers.register("--stop")
        assert stopped.returncode == 0, stopped.stderr
        assert "no servers" in servers.register("--status").stdout


def test_two_calls_at_once_start_each_server_once_and_both_wait_for_it(pair):
    assert [result.returncode for result in pair.results] == [0, 0]
    started = [result.stderr.count("servers to start: 2;") for result in pair.results]
    assert sorted(started) == [0, 1]
    assert sorted(path.name for path in pair.folder.glob("*.pid")) == [f"{port}.pid" for port in pair.ports]


def test_a_second_call_finds_the_servers_running_and_status_shows_them(pair):
    before = {path.name: path.read_text() for path in pair.folder.glob("*.pid")}
    again = pair.start()
    assert again.returncode == 0
    assert before == {path.name: path.read_text() for path in pair.folder.glob("*.pid")}
    status = pair.register("--status").stdout
    for port in pair.ports:
        assert re.search(rf"port {port}  pid \d+  ready  .*{port}\.log", status)
        assert re.search(rf"port {port}  pid \d+  ready ", again.stdout)


def test_servers_draw_random_numbers_of_their_own(pair):
    words = [psutil.Process(int(path.read_text().split()[0])).cmdline() for path in pair.folder.glob("*.pid")]
    assert len({each[each.index("--seed") + 1] for each in words}) == len(words) == 2


def test_a_client_does_not_take_a_server_of_another_model_for_the_one_that_was_refused(pair, tmp_path):
    """As where a script starts the next round's servers, and goes on although the last round's are still there."""
    (tmp_path / "next").mkdir()
    (tmp_path / "next/config.json").write_text("{}")
    register = ["--num_servers", 2, "--port", pair.ports[0]]
    refused = pair.register(tmp_path / "next", *register)
    client = gen_hf(write(tmp_path, 1), "--ports", *pair.ports, "--K", 1, "--max_new_tokens", 4)
    sampled = run_program(*client, env=pair.env)
    for result in (refused, sampled):
        assert result.returncode == 2
        message = rf"port {pair.ports[0]} already serves \S+policy\d+, not \S+next; `register_server.sh --stop` ends it"
        assert re.search(message, result.stderr)
    assert pair.start().returncode == 0
    assert run_program(*client, env=pair.env).returncode == 0


def test_sampled_token_ids_and_finish_reasons_come_back(pair, policy, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    flags = ["--ports", *pair.ports, "--tokenizer", policy, "--K", 4, "--max_new_tokens", 40]
    result = run_program(*gen_hf(write(tmp_path, 20), *flags))
    assert result.returncode == 0, result.stderr
    assert_each_prompt_once(tmp_path / "gen_data.jsonl", 20, 4)
    for record in read(tmp_path / "gen_data.jsonl"):
        samples = zip(record["responses"], record["response_token_ids"], record["finish_reasons"], strict=True)
        for text, ids, reason in samples:
            assert tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd") == text.rstrip("\ufffd")
            assert (ids[-1] == tokenizer.eos_token_id) == (reason == "stop")
    again = run_program(*gen_hf(tmp_path / "prompts.jsonl", *flags))
    assert again.returncode == 0
    assert "up to date" in again.stderr


@pytest.mark.parametrize("asked", ["token ids", "messages"])
def test_log_probabilities_of_the_distribution_that_was_sampled_come_back(pair, policy, tmp_path, asked):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    flags = ["--ports", *pair.ports, "--K", 3, "--max_new_tokens", 20, "--temperature", 0.5, "--response_logps"]
    flags += ["--tokenizer", policy] if asked == "token ids" else ["--model", policy]
    result = run_program(*gen_hf(write(tmp_path, 4), *flags))
    assert result.returncode == 0, result.stderr
    for record in read(tmp_path / "gen_data.jsonl"):
        prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
        for ids, logps in zip(record["response_token_ids"], record["response_logps"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = (logits.float() / 0.5).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            assert logps == pytest.approx(expected, abs=0.05)  # bfloat16


def test_a_server_that_gives_the_models_own_log_probabilities_is_refused_unless_those_were_sampled(policy, tmp_path):
    servers = Pair(policy, tmp_path / "servers")
    assert servers.start(count=1, logprobs_mode="raw_logprobs").returncode == 0
    try:
        flags = ["--ports", servers.ports[0], "--tokenizer", policy, "--K", 1, "--max_new_tokens", 4, "--response_logps"]
        refused = run_program(*gen_hf(write(tmp_path, 2), *flags, "--temperature", 0.7))
        sampled = run_program(*gen_hf(write(tmp_path, 2), *flags, "--overwrite"))
    finally:
        servers.register("--stop")
    assert refused.returncode == 2
    assert f":{servers.ports[0]}/v1: gives the log-probabilities of the model, and not those of" in refused.stderr
    assert "-- --logprobs-mode processed_logprobs" in refused.stderr
    assert sampled.returncode == 0, sampled.stderr


def test_reproducible_sampling_does_not_depend_on_the_server_or_the_workers(pair, policy, tmp_path):
    texts = []
    for number, ports in enumerate((pair.ports, pair.ports[:1])):
        (tmp_path / str(number)).mkdir()
        prompts = write(tmp_path / str(number), 12)
        flags = ["--tokenizer", policy, "--K", 3, "--max_new_tokens", 24, "--reproducible", "--seed", 7]
        result = run_program(*gen_hf(prompts, "--ports", *ports, "--max_workers", 12 - 11 * number, *flags))
        assert result.returncode == 0, result.stderr
        texts.append([record["responses"] for record in read(prompts.with_name("gen_data.jsonl"))])
    assert texts[0] == texts[1]
    assert len({text for responses in texts[0] for text in responses}) > 30


def test_prompts_beyond_the_servers_context_are_dropped_and_a_refusal_names_the_prompt(pair, policy, tmp_path):
    prompts = write(tmp_path, 3)
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "film " * 300, "n": 3}) + "\n")
    flags = ["--ports", *pair.ports, "--K", 2, "--max_new_tokens", 10]
    messages = run_program(*gen_hf(prompts, *flags))  # without a tokenizer it is the server that finds it too long
    assert messages.returncode == 3, messages.stderr
    assert re.search(rf"\({re.escape(str(prompts))}:4\): HTTP 400: .*context length", messages.stderr)
    assert finished_lines(tmp_path / "gen_data.jsonl") == 3
    dropped = run_program(*gen_hf(prompts, *flags, "--drop_failed"))
    assert dropped.returncode == 0, dropped.stderr
    assert_each_prompt_once(tmp_path / "gen_data.jsonl", 3, 2)
    tokens = run_program(*gen_hf(prompts, *flags, "--overwrite", "--tokenizer", policy))
    assert tokens.returncode == 0, tokens.stderr
    assert "1 prompt longer than the context of 200 tokens" in tokens.stderr
    assert_each_prompt_once(tmp_path / "gen_data.jsonl", 3, 2)


def test_servers_of_a_program_end_with_it_at_kill_9_too_and_any_others_complete_its_task(pair, policy, tmp_path):
    prefix, prompts = tmp_path / "gen_data", write(tmp_path, 200)
    output, states = Path(f"{prefix}.jsonl"), Path(f"{prefix}.servers")
    task = ["--dataset_name_or_path", prompts, "--K", 2, "--max_new_tokens", 40, "--temperature", 0.7, "--response_logps"]
    own = ["generation/run_servers.py", "--model_name_or_path", policy, "--output_dir", prefix, *task]
    program = start(*own, "--max_workers", 8, output=str(tmp_path))
    while finished_lines(output) < 3:
        program.join(0.02)
        assert program.exitcode is None, (tmp_path / "stderr").read_text()
    (server,) = (int(path.read_text().split()[0]) for path in states.glob("*.pid"))
    started = [identify(each.pid) for each in (psutil.Process(server), *psutil.Process(server).children(recursive=True))]
    assert len(started) > 1  # the engine is a process of its own
    program.kill()
    while any(map(is_alive, started)):  # else the test's time limit ends it
        time.sleep(0.02)
    kept = finished_lines(output)
    assert 3 <= kept < 200
    with_client = run_program(
        "generation/gen_hf.py", "--output_dir", output, "--ports", *pair.ports, "--tokenizer", policy, *task
    )
    assert with_client.returncode == 0, with_client.stderr
    assert "going on where it stopped" in with_client.stderr
    assert_each_prompt_once(output, 200, 2)
    again = run_program(*own)
    assert again.returncode == 0, again.stderr
    assert "up to date" in again.stderr
    assert "servers start" not in again.stderr


def test_one_of_two_servers_killed_in_the_middle_loses_no_prompt(pair, policy, tmp_path):
    flags = ["--ports", *pair.ports, "--tokenizer", policy, "--K", 4, "--max_new_tokens", 100, "--max_workers", 16]
    command = gen_hf(write(tmp_path, 300), *flags)
    output = tmp_path / "gen_data.jsonl"
    words = [sys.executable, *map(str, command)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_for_lines(process, output, 20)
        pair.kill(pair.ports[0])
        log = process.communicate()[1]
    assert process.returncode == 0, log
    assert f":{pair.ports[0]}/v1: set aside" in log
    assert_each_prompt_once(output, 300, 4)
    assert re.search(rf"port {pair.ports[0]}  pid \d+  dead", pair.register("--status").stdout)


def test_both_servers_killed_keeps_what_is_done_and_a_rerun_completes_it(pair, policy, tmp_path):
    flags = ["--ports", *pair.ports, "--tokenizer", policy, "--K", 4, "--max_new_tokens", 100, "--max_workers", 16]
    command = gen_hf(write(tmp_path, 300), *flags, "--patience", 2)
    output = tmp_path / "gen_data.jsonl"
    words = [sys.executable, *map(str, command)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        wait_for_lines(process, output, 20)
        pair.kill(pair.ports[1])  # the other has been dead since the test before this one
        log = process.communicate()[1]
    assert process.returncode == 3, log
    assert "no server has answered for 2 s" in log
    kept = finished_lines(output)
    assert 20 <= kept < 300
    assert not output.exists()
    refused = run_program(*command)
    assert refused.returncode == 2
    assert "start them with generation/register_server.sh" in refused.stderr
    assert finished_lines(output) == kept
    assert pair.start(count=1).returncode == 0
    result = run_program(*command)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(f":{pair.ports[1]}/v1: set aside") == 1
    assert_each_prompt_once(output, 300, 4)


def test_a_server_that_cannot_start_is_reported_with_its_log(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "no such type"}')
    servers = Pair(tmp_path / "model", tmp_path / "servers")
    result = servers.start(count=1)
    assert result.returncode == 1
    assert re.search(r"port \d+: the server has ended; the end of .*\.log:", result.stderr)
    assert "no such type" in result.stderr
    assert "no servers" in servers.register("--status").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model"),
        (["--ports", "8000"], "unknown option '--ports'"),
        (["./nowhere"], "./nowhere: no such folder"),
        (["some/model", "--num_servers", "none"], "--num_servers must be a positive number, not 'none'"),
        (["some/model", "--max_num_seqs", "many"], "--max_num_seqs must be a positive number, not 'many'"),
        (["some/model", "--port"], "--port needs a value"),
        (["some/model", "other/model"], "one model at a time"),
        (["some/model", "--port", "99999"], "--port 99999: 1 servers would need port 99999; the last one is 65535"),
        (["some/model", "--port", "65535", "--num_servers", "2"], "2 servers would need port 65536"),
    ],
)
def test_register_server_refuses_bad_arguments(tmp_path, arguments, message):
    result = run([*REGISTER, *arguments], env={**os.environ, "BATON_SERVERS": str(tmp_path)})
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_where_one_port_is_taken_no_server_is_started(tmp_path):
    servers = Pair(tmp_path, tmp_path / "servers")
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as other:  # which says nothing
        port = other.getsockname()[1]
        result = servers.register(tmp_path, "--num_servers", 2, "--port", port - 1)
    started = servers.register("--stop").stdout
    assert result.returncode == 2
    assert f"port {port} is taken by a server that was not started here" in result.stderr
    assert started == "stopped: none\n"


HEALTHY = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
BaseHTTPRequestHandler.do_GET = lambda self: (self.send_response(200), self.end_headers())
HTTPServer(("127.0.0.1", int(sys.argv[-1])), BaseHTTPRequestHandler).serve_forever()
"""


def test_a_server_with_other_options_or_of_files_that_have_changed_is_not_taken_for_the_wanted_one(tmp_path, monkeypatch):
    (tmp_path / "serves.py").write_text(HEALTHY)
    monkeypatch.setattr(processes, "VLLM", (str(tmp_path / "serves.py"),))
    monkeypatch.setenv("BATON_SERVERS", str(tmp_path / "servers"))
    model, place = tmp_path / "model", processes.Place("127.0.0.1", two_free_ports()[0])
    model.mkdir()
    (model / "config.json").write_text("{}")

    def started(*options: str) -> list[int]:
        return processes.start_missing([place], str(model), options, 0, {})

    try:
        assert started("--dtype", "float32") == [place.port]
        list(processes.wait_until_ready([place.port], [place.port], 60))
        assert started("--dtype", "float32") == []
        refused = f"already serves {model} with the options --dtype float32, not --dtype float16; `register_server.sh --stop`"
        with pytest.raises(InputError, match=refused):
            started("--dtype", "float16")
        with pytest.raises(InputError, match=refused):  # of a client
            processes.check_not_refused([place.port])
        assert started("--dtype", "float32") == []
        with pytest.raises(InputError, match="--api-key: every user of a machine can read") as refusal:
            started("--api-key", "mine")
        assert "mine" not in str(refusal.value)
        (model / "model.safetensors").write_text("trained anew")
        with pytest.raises(InputError, match=f"already serves {model} as it was before its files changed"):
            started("--dtype", "float32")
    finally:
        processes.stop(processes.known())
    assert started("--dtype", "float32") == [place.port]
    processes.stop(processes.known())


def test_servers_that_need_more_gpus_than_are_visible_are_refused(tmp_path):
    command = [*REGISTER, "some/model", "--num_servers", "2", "--tensor_parallel_size", "2"]
    environment = {"BATON_ENVS": str(made_for("cuda", tmp_path / "envs")), "CUDA_VISIBLE_DEVICES": "4,5,6"}
    result = run(command, env=os.environ | environment | {"BATON_SERVERS": str(tmp_path)})
    assert result.returncode == 2
    assert "2 servers of 2 GPUs each, but there are 3 GPUs" in result.stderr


class Recording(BaseHTTPRequestHandler):
    """A server that says it is vLLM, notes the path and body of each request, and refuses it."""

    def do_GET(self):
        self.say(200, {"data": [{"id": "model", "owned_by": "vllm", "max_model_len": 99}]})

    def do_POST(self):
        self.server.requests.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.say(400, {"error": {"message": "noted"}})

    def say(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Say nothing on the test's terminal."""


def test_no_sampling_setting_of_the_models_own_acts_on_any_request(tmp_path):
    """What vLLM itself makes of the requests of all three clients, with a model's settings and without."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from baton.servers.rollouts import Rollouts
    from generation.arguments import SamplingArguments
    from generation.chat_models import ServedModel

    with ThreadingHTTPServer(("127.0.0.1", 0), Recording) as server:
        server.daemon_threads, server.requests = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert run_program(*gen_hf(write(tmp_path, 1), "--url", url, "--K", 1)).returncode == 3
        with pytest.raises(InputError, match="noted"):
            list(ServedModel(f"{url}/v1", None, SamplingArguments(), None).answer([{"role": "user", "content": "a"}], 0))
        with Rollouts([url], None) as rollouts, pytest.raises(InputError, match="noted"):
            list(rollouts.sample([[1]], 1, {"max_tokens": 8}, [0]))
        server.shutdown()
    assert len(server.requests) == 3
    own = {"temperature": 0.1, "top_p": 0.1, "top_k": 1, "min_p": 0.9}
    own |= {f"{name}_penalty": 1.5 for name in ("repetition", "presence", "frequency")}
    for path, body in server.requests:
        request = (ChatCompletionRequest if "chat" in path else CompletionRequest)(**body)
        assert own.keys() == request._DEFAULT_SAMPLING_PARAMS.keys()
        assert request.to_sampling_params(8, own) == request.to_sampling_params(8, {})


@pytest.mark.parametrize("trouble", ["500", "503", "429", "408", "half", "lie", "close", "odd", "abort", "hang"])
def test_trouble_that_passes_is_tried_again_until_every_prompt_is_there(tmp_path, trouble):
    times = 1 if trouble == "hang" else 3
    with MisbehavingServer(script=(trouble,) * times) as server:
        command = gen_hf(write(tmp_path, 6), "--ports", server.port, "--K", 2, "--timeout", 1)
        result = run_program(*command)
    assert result.returncode == 0, result.stderr
    assert set(server.seen.values()) == {times + 1}
    assert_each_prompt_once(tmp_path / "gen_data.jsonl", 6, 2)
    records = read(tmp_path / "gen_data.jsonl")
    assert [record["responses"] for record in records] == [[f"film {n}, 0", f"film {n}, 1"] for n in range(6)]
    assert all(record["finish_reasons"] == ["stop", "stop"] for record in records)
    assert not any("response_token_ids" in record for record in records)  # left out, never invented


def test_trouble_that_does_not_pass_is_listed_and_the_rest_is_kept(tmp_path):
    prompts = write(tmp_path, 3)
    with MisbehavingServer(script=("500",) * 100) as server:
        result = run_program(*gen_hf(prompts, "--ports", server.port, "--K", 2, "--max_retries", 2))
        assert set(server.seen.values()) == {3}
    assert result.returncode == 3, result.stderr
    assert "3 of 3 prompts failed" in result.stderr
    assert re.search(rf"\({re.escape(str(prompts))}:1\): .*HTTP 500: the server says 500", result.stderr)


def test_a_hanging_server_does_not_hold_what_the_other_can_do(tmp_path):
    with MisbehavingServer(script=("hang",) * 100) as hangs, MisbehavingServer() as works:
        command = gen_hf(write(tmp_path, 6), "--ports", hangs.port, works.port, "--K", 2, "--timeout", 1)
        result = run_program(*command)
    assert result.returncode == 0, result.stderr
    assert_each_prompt_once(tmp_path / "gen_data.jsonl", 6, 2)


def test_servers_that_fail_at_once_do_not_keep_a_prompt_from_one_that_works(tmp_path):
    """They are always free, so that a prompt would go from the one to the other."""
    with MisbehavingServer(("500",) * 9) as one, MisbehavingServer(("500",) * 9) as other, MisbehavingServer() as works:
        ports = [server.port for server in (one, other, works)]
        result = run_program(*gen_hf(write(tmp_path, 6), "--ports", *ports, "--K", 2, "--max_retries", 2))
    assert result.returncode == 0, result.stderr
    assert_each_prompt_once(tmp_path / "gen_data.jsonl", 6, 2)


def test_a_server_that_gives_too_few_responses_is_named_with_the_prompt(tmp_path):
    prompts = write(tmp_path, 2)
    with MisbehavingServer(script=("few",) * 100) as server:
        result = run_program(*gen_hf(prompts, "--ports", server.port, "--K", 4))
    assert result.returncode == 3
    assert re.search(rf"\({re.escape(str(prompts))}:1\): 3 responses instead of 4", result.stderr)


def test_no_more_requests_are_in_flight_than_workers(tmp_path):
    with MisbehavingServer() as server:
        result = run_program(*gen_hf(write(tmp_path, 40), "--ports", server.port, "--K", 1, "--max_workers", 3))
    assert result.returncode == 0
    assert server.most_in_flight <= 3


def test_an_api_key_is_sent_and_its_refusal_is_an_error_that_keeps_it_secret(tmp_path):
    prompts = write(tmp_path, 2)
    with MisbehavingServer(api_key="right-key") as server:
        wrong = run_program(*gen_hf(prompts, "--ports", server.port, "--K", 1, "--api_key", "wrong-key"))
        right = run_program(*gen_hf(prompts, "--url", f"http://127.0.0.1:{server.port}", "--K", 1, "--api_key", "right-key"))
    assert wrong.returncode == 2
    assert "refuses the API key" in wrong.stderr
    assert right.returncode == 0, right.stderr
    assert "right-key" not in (tmp_path / "gen_data.jsonl.manifest.json").read_text() + right.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which servers"),
        (["--ports", "0"], "a port is a number"),
        (["--ports", "8000x"], "`ports`"),
        (["--url", "ftp://host"], "--url ftp://host: expected an address"),
        (["--ports", "1"], "no server answers at http://127.0.0.1:1/v1"),
        (["--ports", "1", "--tokenizer", "./nowhere"], "./nowhere: no such folder"),
        (["--ports", "1", "--chat_template", __file__], "--chat_template: without --tokenizer a server applies its own"),
        (["--ports", "1", "--max_workers", "0"], "`max_workers`"),
        (["--ports", "1", "--timeout", "0"], "`timeout`"),
    ],
)
def test_bad_arguments_of_the_client_are_named(tmp_path, arguments, message):
    result = run_program(*gen_hf(write(tmp_path, 1), *arguments))
    assert result.returncode == 2
    assert message in result.stderr


def test_a_model_that_no_server_serves_is_named_with_those_they_do(tmp_path):
    with MisbehavingServer() as server:
        result = run_program(*gen_hf(write(tmp_path, 1), "--ports", server.port, "--model", "other"))
    assert result.returncode == 2
    assert "--model other: the servers serve scripted" in result.stderr
