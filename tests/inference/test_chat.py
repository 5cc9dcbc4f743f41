"""generation/chat.py, talked to through a pipe: with Transformers, with vLLM, and with a real vLLM server."""

import json
import os
import re
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.inference.tiny_policy import make_tiny_policy
from tests.programs import ROOT, read_jsonl, run_program, start

READS = """
import os, runpy, sys
del sys.argv[0]
os.dup2(os.open(sys.argv.pop(0), os.O_RDONLY), 0)
sys.stdin = open(0, encoding="utf-8")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return make_tiny_policy(tmp_path_factory.mktemp("policy"), context=1024)


@pytest.fixture(scope="module")
def url(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    env = {**os.environ, "BATON_SERVERS": str(folder)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["generation/register_server.py", policy, "--port", port, "--num_servers", 1, "--dtype", "float32"]
    started = run_program(*words, env=env)
    try:
        assert started.returncode == 0, started.stderr
        yield f"http://127.0.0.1:{port}"
    finally:
        run_program("generation/register_server.py", "--stop", env=env)


def words_of(folder: Path, lines: Path, *words: object) -> list[object]:
    """The words of a chat that reads `lines` as its stdin."""
    script = folder / "reads.py"
    script.write_text(READS)
    return [script, lines, ROOT / "generation/chat.py", *words]


def talk(folder: Path, lines: list[str], *words: object):
    """The finished chat in which these lines were typed."""
    typed = folder / "typed"
    typed.write_text("".join(f"{line}\n" for line in lines))
    return run_program(*words_of(folder, typed, *words))


def roles(record: dict) -> str:
    return "".join(message["role"][0] for message in record["messages"])


def test_a_conversation_of_several_turns_is_saved_with_what_was_sampled(policy, tmp_path):
    from transformers import AutoTokenizer

    saved = tmp_path / "saved.jsonl"
    saved.write_text('{"n": 1}')  # a last line without its end
    lines = ["what film", f"/save {saved}", "/retry", "/system Be brief.", '"""', "/what", "story", '"""', f"/save {saved}"]
    lines += ["/reset", "joy", f"/save {saved}", "/exit", "not read"]
    done = talk(tmp_path, lines, policy, "--max_new_tokens", 16)
    assert done.returncode == 0, done.stderr
    _, first, second, third = read_jsonl(saved)
    assert [roles(record) for record in (first, second, third)] == ["ua", "suaua", "sua"]
    assert second["messages"][3]["content"] == "/what\nstory"
    assert first["messages"][1] != second["messages"][2]  # it was sampled again
    tokenizer = AutoTokenizer.from_pretrained(policy)
    for record in (first, second, third):
        assert record["sampled"][-1]["response_token_ids"] == record["response_token_ids"]
        for sampled in record["sampled"]:
            text = tokenizer.decode(sampled["response_token_ids"], skip_special_tokens=True)
            assert text.startswith(record["messages"][sampled["message"]]["content"].rstrip("\ufffd"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout)  # the tiny model says such characters


def test_a_second_model_answers_the_same_question_and_the_conversation_stays(policy, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = ["/compare x", "what film", f"/compare {policy}", "/compare ./nowhere", "/retri", f"/save {saved}"]
    done = talk(tmp_path, lines, policy, "--max_new_tokens", 16, "--temperature", 0)
    assert done.returncode == 3
    for message in ("nothing is asked yet", r"\./nowhere: no such folder", "/retri: no command; /help", "3 of the lines"):
        assert re.search(message, done.stderr)
    _, *both = re.split(rf"\[{policy}\]\n", done.stdout)
    assert len(both) == 2
    assert both[0] == both[1]  # the same model, greedy
    assert roles(read_jsonl(saved)[0]) == "ua"


def test_a_conversation_beyond_the_context_loses_its_earliest_turns_and_says_so(policy, tmp_path):
    saved, long = tmp_path / "saved.jsonl", "the film was a quiet joy " * 10
    lines = [f"{n} {long}" for n in range(4)] + [f"/save {saved}", long * 9]
    flags = ["--max_new_tokens", 8, "--max_model_len", 256, "--min_new_tokens", 8, "--system_prompt", "brief"]
    done = talk(tmp_path, lines, policy, *flags)
    assert done.returncode == 3
    assert "the first turn is dropped ('0 the film" in done.stderr
    assert "leave no room for an answer in the context of 256 tokens; ask a shorter question" in done.stderr
    (record,) = read_jsonl(saved)
    assert record["messages"][0] == {"role": "system", "content": "brief"}
    assert 1 <= roles(record).count("u") < 4
    assert record["messages"][-2]["content"].startswith("3 ")
    assert all(len(sampled["response_token_ids"]) == 8 for sampled in record["sampled"])


def test_vllm_and_a_server_answer_as_transformers_does(policy, url, tmp_path):
    texts = {}
    flags = ["--max_new_tokens", 12, "--temperature", 0, "--stop", "zz"]
    ways = {
        "hf": [policy, "--backend", "hf"],
        "vllm": [policy, "--backend", "vllm", "--dtype", "float32"],
        "url": ["--url", url],
    }
    for name, way in ways.items():
        saved = tmp_path / f"{name}.jsonl"
        done = talk(tmp_path, ["what film", "the story", f"/save {saved}"], *way, *flags)
        assert done.returncode == 0, done.stderr
        (record,) = read_jsonl(saved)
        texts[name] = [record["messages"], [sampled["response_token_ids"] for sampled in record["sampled"]]]
        assert done.stdout.count("\n") >= 2
    assert texts["hf"] == texts["vllm"] == texts["url"]


@pytest.mark.parametrize("way", ["hf", "vllm", "url"])
def test_ctrl_c_stops_an_answer_and_not_the_program(way, policy, tmp_path, request):
    saved, typed, output = tmp_path / "saved.jsonl", tmp_path / "typed", tmp_path / "output"
    output.mkdir()
    os.mkfifo(typed)
    where = ["--url", request.getfixturevalue("url")] if way == "url" else [policy, "--backend", way, "--dtype", "float32"]
    words = words_of(tmp_path, typed, *where, "--max_new_tokens", 950, "--min_new_tokens", 950)
    process = start(*words, output=output)
    with typed.open("w") as lines:
        print("what film", file=lines, flush=True)
        deadline = time.monotonic() + 60
        while len((output / "stdout").read_bytes() if (output / "stdout").exists() else b"") < 20:
            assert process.exitcode is None and time.monotonic() < deadline, (output / "stderr").read_text()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGINT)
        print(f"/save {saved}", file=lines, flush=True)
    process.join(60)
    assert process.exitcode == 0, (output / "stderr").read_text()
    assert "[stopped]" in (output / "stderr").read_text()
    (record,) = read_jsonl(saved)
    assert record["finish_reason"] == "abort"
    assert "response_token_ids" not in record
    assert len(record["messages"][1]["content"]) > 5


class Strange(BaseHTTPRequestHandler):
    """A server that answers each question with the next of `server.events`, the last one with itself for ever."""

    def do_GET(self):
        self.say("application/json", {"data": [{"id": "model", "owned_by": "\x1b[2J"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        events = self.server.events
        self.say("text/event-stream", events.pop(0) if len(events) > 1 else events[0], "data: ")

    def say(self, kind, content, before=""):
        data = f"{before}{json.dumps(content)}\n\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Say nothing on the test's terminal."""


def test_a_server_that_answers_strangely_costs_a_question_and_commands_no_terminal(tmp_path):
    good = {"choices": [{"delta": {"content": "half \ud800 of a pair \x1b[2J"}, "finish_reason": "stop"}]}
    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        server.daemon_threads, saved = True, tmp_path / "saved.jsonl"
        server.events = [{"choices": {"one": 1}}, {"choices": [{"delta": {"content": 7}}]}, {"error": "\x1b]0;owned\x07"}, good]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = ["one", "two", "three", "four", "five", f"/save {saved}"]
        done = talk(tmp_path, lines, "--url", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 3, done.stderr
    assert "3 of the lines were not answered" in done.stderr and done.stderr.count("not one of the OpenAI API") == 3
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout + done.stderr)
    (record,) = read_jsonl(saved)
    assert roles(record) == "uaua" and record["messages"][1]["content"] == "half ? of a pair \x1b[2J"


def test_what_cannot_be_is_refused_before_a_model_is_loaded(policy, tmp_path):
    nobody = "http://127.0.0.1:9"
    for words, message in (
        ([], "which model"),
        (["./nowhere"], r"\./nowhere: no such folder"),
        ([policy, "--min_new_tokens", 9, "--max_new_tokens", 8], "--min_new_tokens 9 is above"),
        (["--url", nobody], "127.0.0.1:9/v1: does not answer"),
        (["--url", "host:8000"], "expected an address that begins with http"),
        (["--url", nobody, "--chat_template", __file__], "a server applies its own"),
    ):
        done = talk(tmp_path, ["hello"], *words)
        assert done.returncode == 2
        assert re.search(message, done.stderr)
    assert "would talk to" in talk(tmp_path, [], policy, "--check").stderr


def test_a_stop_string_is_neither_shown_nor_kept_when_it_comes_in_pieces():
    from generation.transformers_engine import until_stop

    for stop in ("cde", "ef"):
        for size in range(1, 8):
            text = "abcdabcdefg"
            pieces = (text[i : i + size] for i in range(0, len(text), size))
            assert "".join(until_stop(pieces, [stop, "zz"])) == text[: text.index(stop)]
    assert "".join(until_stop(iter(["ab", "c"]), [])) == "abc"
