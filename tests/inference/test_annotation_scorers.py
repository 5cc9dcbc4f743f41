"""Scorers beside the plain reward model: equal rewards through vLLM and HTTP; functions, pairs, judges; their failures."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from annotate_data.function_reward import FunctionReward, stop
from annotate_data.judge import parse_score
from annotate_data.work import Responses, Task
from baton.errors import InputError
from tests.inference.annotation_task import (
    GOOD,
    ROOT,
    command,
    environment,
    generated,
    make_models,
    read,
    rewards_in,
    run,
    write,
)
from tests.programs import run_program, start

REWARDS = "get_rewards.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def annotated(models, tmp_path_factory):
    """Input and output of the plain scorer over 12 prompts."""
    folder = tmp_path_factory.mktemp("annotated")
    source, output = write(folder / "in.jsonl", generated(12)), folder / "out.jsonl"
    run(REWARDS, dataset_name_or_path=source, output_dir=output, scorer=f"bt:{models / 'rm'}")
    return source, output


def test_vllm_gives_the_same_rewards(annotated, models, tmp_path):
    source, output = annotated
    log = run(
        REWARDS, dataset_name_or_path=source, output_dir=tmp_path / "o.jsonl", scorer=f"vllm:{models / 'rm'}", dtype="float32"
    )
    assert "engine=vLLM pooling" in log
    assert rewards_in(tmp_path / "o.jsonl") == pytest.approx(rewards_in(output), abs=1e-4)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def service(models):
    """The URL of a running serve_rm.py, whose key is `secret`."""
    port = free_port()
    values = {"reward_name_or_path": models / "rm", "port": port, "api_key": "secret"}
    process = subprocess.Popen(command("serve_rm.py", **values), env=environment())
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/get_reward"
    finally:
        process.terminate()
        process.wait(30)


def wait_until_healthy(url, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"the server ended with exit code {process.wait(0.5)}")
    raise TimeoutError(url)


def test_the_service_gives_the_same_rewards_also_when_one_of_its_servers_is_gone(annotated, service, tmp_path):
    source, output = annotated
    gone = f"http://127.0.0.1:{free_port()}/get_reward"
    for number, urls in enumerate([service, f"{gone},{service}"]):
        out = tmp_path / f"{number}.jsonl"
        run(REWARDS, dataset_name_or_path=source, output_dir=out, scorer=f"http:{urls}", api_key="secret")
        assert rewards_in(out) == pytest.approx(rewards_in(output), abs=1e-5)


def test_the_service_names_what_is_wrong(annotated, service, tmp_path):
    values = {"dataset_name_or_path": annotated[0], "output_dir": tmp_path / "o.jsonl", "scorer": f"http:{service}"}
    assert "refuses the API key" in run(REWARDS, code=2, api_key="wrong", **values)
    for body, message in [
        ({}, "`query`"),
        ({"messages": [[{"role": "user"}]]}, "`content` must be a string"),
        ({"query": []}, "`query`"),
    ]:
        request = urllib.request.Request(
            service,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer secret"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)
        assert refused.value.code == 422
        assert message in refused.value.read().decode()


@contextmanager
def misbehaving(answer):
    """A server on this machine; `answer(number of the request, body)` gives (status, bytes), or None to hang up."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            made = answer(len(seen), body)
            if made is None:
                self.close_connection = True
                return
            status, content = made
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def lengths(body):
    return 200, json.dumps({"rewards": [float(len(query)) for query in body["query"]]}).encode()


def test_a_service_that_fails_at_first_is_asked_again(tmp_path):
    troubles = {  # of three records, each asked for until it is answered
        1: (500, b"busy"),
        2: (429, b"slow down"),
        4: None,
        5: (200, b'{"rewards": [1.0,'),
        7: (200, b'{"rewards": [1.0]}'),
        8: (425, b"too early"),
    }
    source, out = write(tmp_path / "in.jsonl", [GOOD] * 3), tmp_path / "o.jsonl"
    with misbehaving(lambda number, body: troubles.get(number) if number in troubles else lengths(body)) as (url, seen):
        run(REWARDS, dataset_name_or_path=source, output_dir=out, scorer=f"http:{url}", tries=3, workers=1)
    assert len(seen) == 9
    assert [record["rewards"] for record in read(out)] == [[6.0, 6.0]] * 3
    assert seen[0]["query"] == ["Helloa", "Hellob"]
    assert seen[0]["prompts"] == ["Hello", "Hello"]


@pytest.mark.parametrize("ending", [(500, b"broken"), None], ids=["broken", "gone"])
def test_a_service_that_stays_away_ends_the_program_and_only_what_is_missing_is_asked_for_again(tmp_path, ending):
    source, out = write(tmp_path / "in.jsonl", generated(12)), tmp_path / "o.jsonl"
    values = {"dataset_name_or_path": source, "output_dir": out, "workers": 1, "tries": 1}
    with misbehaving(lambda number, body: lengths(body) if number <= 4 else ending) as (url, seen):
        log = run(REWARDS, code=3, scorer=f"http:{url}", **values)
        assert len(seen) <= 8, "after three failures in a row it is away"
        ids = [record["id"] for _, record in Responses(str(source))]
        for said in ("24 of 36 scores are missing", f"of 8 records: {', '.join(ids[4:])}", "status 500" if ending else url):
            assert said in log
        assert not out.exists() and "up to date" not in run(REWARDS, code=3, scorer=f"http:{url}", **values)
        # What a user accepts are answers that do not come, not a service that is away.
        assert "24 of 36" in run(REWARDS, code=3, scorer=f"http:{url}", unanswered="drop", **values)
    with misbehaving(lambda number, body: lengths(body)) as (url, seen):
        run(REWARDS, scorer=f"http:{url}", **values)
    assert len(seen) == 8
    assert len(read(out)) == 12
    assert not list(tmp_path.glob("*.partial*"))


def test_where_nobody_can_be_reached_the_first_request_ends_the_program(tmp_path):
    source = write(tmp_path / "in.jsonl", generated(4))
    scorer = f"judge:http://127.0.0.1:{free_port()}/v1"
    values = {"dataset_name_or_path": source, "output_dir": tmp_path / "o.jsonl", "judge_model": "judge", "workers": 1}
    log = run(REWARDS, code=3, scorer=scorer, tries=2, **values)
    assert "12 of 12 scores are missing" in log and "1 × judge: " in log and "Connection refused (2 tries)" in log
    assert not list(tmp_path.glob("*.lock"))


def silent_on_slow(number, body):
    if "slow" in body["query"][0]:
        return 503, b"took too long"
    return (422, b"too long") if "refused" in body["query"][0] else lengths(body)


def test_a_text_that_a_service_does_not_answer_keeps_no_other_from_its_score_and_is_asked_for_again(tmp_path):
    names = ("one", "slow", "two", "refused", "three")
    source = write(tmp_path / "in.jsonl", [{**GOOD, "prompt": name, "id": name} for name in names])
    values = {"dataset_name_or_path": source, "output_dir": tmp_path / "o.jsonl", "workers": 1, "tries": 2}
    with misbehaving(silent_on_slow) as (url, seen):
        log = run(REWARDS, code=3, scorer=f"http:{url}", **values)
        assert "2 of 10 scores are missing" in log and "http: of 1 records: slow" in log and "status 503: took too long" in log
        assert not (tmp_path / "o.jsonl").exists()
        seen.clear()
        log = run(REWARDS, code=3, scorer=f"http:{url}", unanswered="drop", **values)
        assert [body["query"][0] for body in seen] == ["slowa"] * 2
    assert [record["id"] for record in read(tmp_path / "o.jsonl")] == ["one", "two", "three"]
    manifest = json.loads((tmp_path / "o.jsonl.manifest.json").read_text())
    refused, slow = sorted(manifest["counts"]["dropped"], reverse=True)
    assert refused == "refused by the service, status 422" and slow.startswith("no answer: http://127.0.0.1:")


def test_a_service_that_refuses_everything_is_a_mistake_and_leaves_no_output(tmp_path):
    source = write(tmp_path / "in.jsonl", [{**GOOD, "id": "the-id"}, GOOD])
    for status, message in ((400, "no such thing"), (404, "are the address and the model's name right?")):
        with misbehaving(lambda number, body, status=status: (status, b"no such thing")) as (url, _):
            values = {"dataset_name_or_path": source, "output_dir": tmp_path / "o.jsonl", "scorer": f"http:{url}"}
            log = run(REWARDS, code=2, workers=1, **values)
        assert "prompt the-id" in log
        assert message in log
        assert not (tmp_path / "o.jsonl").exists() and not (tmp_path / "o.jsonl.partial").exists()


class Proxy(ThreadingHTTPServer):
    """An HTTP proxy that answers for everybody, and remembers for whom."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.asked = []


class ProxyHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(self.path)
        status, content = lengths(body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Nothing is logged."""


def test_services_outside_are_asked_through_the_proxy_and_those_here_never(tmp_path):
    proxy = Proxy()
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    source = write(tmp_path / "in.jsonl", [GOOD])
    variables = environment() | dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), f"http://127.0.0.1:{proxy.server_port}")
    variables |= {"NO_PROXY": "spared.invalid"}

    def ask(url, code, **changes):
        values = {"dataset_name_or_path": source, "output_dir": tmp_path / f"{len(proxy.asked)}.jsonl", "tries": 1}
        words = command(REWARDS, scorer=f"http:{url}", overwrite="true", **values)[1:]
        done = run_program(*words, env=variables | changes)
        assert done.returncode == code, done.stderr
        return done.stderr

    with misbehaving(lambda number, body: lengths(body)) as (url, seen):
        ask(url, 0)
        ask(url.replace("127.0.0.1", "localhost"), 0)
    assert (len(seen), proxy.asked) == (2, [])
    ask("http://judge.invalid/get_reward", 0)
    assert proxy.asked == ["http://judge.invalid/get_reward"]
    ask("http://spared.invalid/get_reward", 3)
    assert len(proxy.asked) == 1
    log = ask("http://judge.invalid/get_reward", 2, HTTP_PROXY="socks5://me:hunter2@127.0.0.1:9")
    assert "HTTP_PROXY: expected the address of a proxy" in log and "hunter2" not in log
    proxy.shutdown()
    proxy.server_close()


def chat(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def test_a_judge_is_asked_again_until_it_gives_a_number_and_else_listed(tmp_path):
    records = [{"prompt": f"Question {name}", "responses": ["good", "bad"], "id": name} for name in ("one", "two", "mute")]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl"

    def answer(number, body):
        text = body["messages"][0]["content"]
        if "mute" in text or (body["seed"] == 0 and "Question one" in text):
            return chat("I would rather not say. Out of 10?")
        return chat("Clear.\nScore: 9" if "[Answer]\ngood" in text else "Score: **2.5**")

    values = {"dataset_name_or_path": source, "output_dir": out, "judge_model": "judge", "tries": 3}
    with misbehaving(answer) as (url, seen):
        log = run(REWARDS, code=3, scorer=f"judge:{url}/v1", **values)
    assert [(record["id"], record["rewards"]) for record in read(out)] == [("one", [9.0, 2.5]), ("two", [9.0, 2.5])]
    assert "dropped mute" in log
    assert len(seen) == 2 * 2 + 2 + 2 * 3
    manifest = json.loads(Path(f"{out}.manifest.json").read_text())
    assert manifest["counts"] == {"in": 3, "out": 2, "dropped": {"the judge gave no score from 1 to 10": 1}}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 7.0),
        ("The score could be 3.\n**Score:** 8/10", 8.0),
        ("score = 2.5.", 2.5),
        ("9", 9.0),
        ("6 / 10", 6.0),
        ("Score: 0", None),
        ("Score: -3", None),
        ("Score: 11", None),
        ("I give it a 7, out of 10", None),
        ("", None),
    ],
)
def test_a_judges_answer_is_a_score_only_if_it_plainly_gives_one_from_1_to_10(answer, score):
    assert parse_score(answer) == score


def function_file(folder, body):
    file = folder / "rules.py"
    file.write_text(f"import math, os, time\n\ndef rule(prompts, responses, records):\n    {body}\n", encoding="utf-8")
    return f"function:{file}:rule"


def test_a_function_sees_prompt_response_and_record(tmp_path):
    source, out = write(tmp_path / "in.jsonl", generated(20)), tmp_path / "o.jsonl"
    body = (
        "print('noise'); rows = zip(prompts, responses, records)\n"
        "    return [len(p[0]['content']) + len(r) + c['source']['number'] for p, r, c in rows]"
    )
    run(REWARDS, dataset_name_or_path=source, output_dir=out, scorer=function_file(tmp_path, body))
    for record in read(out):
        base = len(record["prompt"][0]["content"]) + record["source"]["number"]
        assert record["rewards"] == [base + len(response) for response in record["responses"]]


def test_another_function_of_a_file_or_a_changed_module_beside_it_is_another_task(tmp_path):
    (tmp_path / "lengths.py").write_text("FACTOR = 1\n")
    (tmp_path / "rules.py").write_text(
        "from lengths import FACTOR\n\ndef longer(p, responses, r):\n    return [FACTOR * len(text) for text in responses]\n"
        "\ndef shorter(p, responses, r):\n    return [-FACTOR * len(text) for text in responses]\n"
    )
    flags = {"dataset_name_or_path": write(tmp_path / "in.jsonl", generated(2)), "output_dir": tmp_path / "o.jsonl"}
    run(REWARDS, scorer=f"function:{tmp_path}/rules.py:longer", **flags)
    assert "function:longer" in run(REWARDS, code=2, scorer=f"function:{tmp_path}/rules.py:shorter", **flags)
    (tmp_path / "lengths.py").write_text("FACTOR = 2\n")
    log = run(REWARDS, code=2, scorer=f"function:{tmp_path}/rules.py:longer", **flags)
    assert f"the content of {tmp_path}/lengths.py has changed" in log


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('nothing to say')", "prompt the-id: rule raised ValueError"),
        ("return [1.0]", "prompt the-id: .*gave 1 rewards for 2 responses"),
        ("return [1.0, math.nan]", "response 2 of prompt the-id: function gave nan"),
        ("os._exit(1)", "prompt the-id: .*ended its process"),
    ],
)
def test_a_function_that_fails_names_the_prompt(tmp_path, body, message):
    source = write(tmp_path / "in.jsonl", [{**GOOD, "id": "the-id"}])
    scorer = function_file(tmp_path, body)
    log = run(REWARDS, code=2, dataset_name_or_path=source, output_dir=tmp_path / "o.jsonl", scorer=scorer, workers=1)
    assert re.search(message, log), log
    assert log.count("nothing to say") == 2 * ("nothing to say" in body)  # its line and its message, once each
    assert not (tmp_path / "o.jsonl").exists()


def test_a_record_at_which_a_function_raises_is_dropped_and_the_traceback_shown_once(tmp_path):
    records = [{**GOOD, "id": f"{i}"} for i in range(6)]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl"
    body = "if int(records[0]['id']) % 2 == 0: raise ValueError(chr(27) + '[2J')\n    return [1, 2]"
    scorer = function_file(tmp_path, body)
    log = run(REWARDS, code=3, dataset_name_or_path=source, output_dir=out, scorer=scorer, workers=2)
    assert [record["id"] for record in read(out)] == ["1", "3", "5"]
    assert log.count("Traceback") == 1 and log.count("dropped") >= 3 and "rule raised ValueError" in log and "\x1b" not in log


def test_a_file_that_cannot_be_imported_says_why_once(tmp_path):
    """Also to a record that comes to a worker which has said it to another record already."""
    scorer = function_file(tmp_path, "return [1, 2]")
    (tmp_path / "rules.py").write_text("import no_such_module\n" + (tmp_path / "rules.py").read_text())
    reward = FunctionReward(scorer.removeprefix("function:"), workers=1, seconds=10)
    reward.start()
    for position in range(2):
        with pytest.raises(InputError, match="No module named 'no_such_module'"):
            reward.score(Task(position, "", GOOD, GOOD["prompt"], ["good"], [0]))
    stop(reward.idle.get().process)
    values = {"dataset_name_or_path": write(tmp_path / "in.jsonl", generated(9)), "output_dir": tmp_path / "o.jsonl"}
    log = run(REWARDS, code=2, scorer=scorer, workers=3, **values)
    assert log.count("Traceback") == 1 and log.count("No module named 'no_such_module'") == 1 and "rules.py" in log


def test_a_slow_import_is_no_slow_call(tmp_path):
    scorer = function_file(tmp_path, "return [1, 2]")
    (tmp_path / "rules.py").write_text("import time; time.sleep(1.5)\n" + (tmp_path / "rules.py").read_text())
    values = {"dataset_name_or_path": write(tmp_path / "in.jsonl", [GOOD]), "output_dir": tmp_path / "o.jsonl"}
    run(REWARDS, scorer=scorer, workers=1, timeout=1, **values)
    assert rewards_in(tmp_path / "o.jsonl") == [1, 2]


def test_a_function_that_takes_too_long_is_asked_for_its_record_alone_again(tmp_path):
    records = [{**GOOD, "id": "quick"}, {**GOOD, "id": "slow"}, {**GOOD, "id": "quick too"}]
    source, out, calls = write(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl", tmp_path / "calls"
    body = (
        f"open({str(calls)!r}, 'a').write(records[0]['id'] + '\\n')\n"
        "    return time.sleep(600) if records[0]['id'] == 'slow' else [1, 2]"
    )
    values = {"dataset_name_or_path": source, "output_dir": out, "scorer": function_file(tmp_path, body)}
    log = run(REWARDS, code=3, timeout=1, workers=1, **values)
    assert not out.exists()
    for said in ("2 of 6 scores are missing", "of 1 records: slow", "2 × function: rule took longer than 1 s"):
        assert said in log
    calls.unlink()
    log = run(REWARDS, code=3, timeout=1, workers=1, unanswered="drop", **values)
    assert calls.read_text() == "slow\n"
    assert [record["id"] for record in read(out)] == ["quick", "quick too"]
    assert "dropped slow" in log
    assert "up to date" in run(REWARDS, timeout=1, **values)


class JustInTime:
    """A worker's answers, each of which is read, and only then its time is over."""

    def __init__(self, process):
        self.process, self.pipe = process, process.stdout

    def readline(self):
        line = self.pipe.readline()
        self.process.wait()
        return line

    def close(self):
        self.pipe.close()


def test_a_worker_that_is_ended_while_its_answer_is_read_is_not_called_again(tmp_path):
    function = FunctionReward(function_file(tmp_path, "return [1, 2]").removeprefix("function:"), workers=1, seconds=0.5)
    function.start()
    function.wait_for_imports()
    worker = function.idle.get()
    worker.process.stdout = JustInTime(worker.process)
    function.idle.put(worker)
    task = Task(0, "f:1", {"id": "a"}, [{"role": "user", "content": "Hello"}], GOOD["responses"], [0, 1])
    late, good = function.score(task), function.score(task)
    stop(function.idle.get().process)
    assert [(score.value, score.again) for score in late] == [(None, True)] * 2
    assert [score.value for score in good] == [1, 2]


def test_a_function_may_stand_beside_a_dataclass_with_annotations_as_text(tmp_path):
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "@dataclass", "class Rule:"]
    lines += ["    bonus: float", "def rule(prompts, responses, records):", "    return [Rule(1.5).bonus for _ in responses]"]
    (tmp_path / "rules.py").write_text("\n".join(lines))
    source, out = write(tmp_path / "in.jsonl", [GOOD]), tmp_path / "o.jsonl"
    run(REWARDS, dataset_name_or_path=source, output_dir=out, scorer=f"function:{tmp_path / 'rules.py'}:rule")
    assert rewards_in(out) == [1.5, 1.5]


def test_kill_9_of_the_program_ends_its_function_workers(tmp_path):
    os.mkfifo(tmp_path / "pids")
    body = f"open({str(tmp_path / 'pids')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    source, scorer = write(tmp_path / "in.jsonl", [GOOD]), function_file(tmp_path, body)
    values = {"dataset_name_or_path": source, "output_dir": tmp_path / "o.jsonl", "scorer": scorer, "workers": 1}
    program = start(*command(REWARDS, **values)[1:], env=environment())
    worker = os.pidfd_open(int((tmp_path / "pids").read_text()))
    program.kill()
    ended, _, _ = select.select([worker], [], [], 30)
    if not ended:
        signal.pidfd_send_signal(worker, signal.SIGKILL)
    os.close(worker)
    assert ended, "the worker lives on"


def reward_of(folder, body, seconds=20):
    """A function's reward, its one worker started; `score_of` asks it."""
    reward = FunctionReward(function_file(folder, body).removeprefix("function:"), workers=1, seconds=seconds)
    reward.start()
    reward.wait_for_imports()
    return reward


def score_of(reward, **fields):
    """The first score of a record with these fields."""
    task = Task(0, "f:1", {"id": "a", **fields}, [{"role": "user", "content": "Hello"}], GOOD["responses"], [0, 1])
    return reward.score(task)[0]


@pytest.mark.parametrize("more", ["", "os.setsid(); "], ids=["forked", "in a session of its own"])
def test_the_time_limit_of_a_function_holds_also_where_it_starts_processes(tmp_path, more):
    os.mkfifo(tmp_path / "end")
    body = f"if os.fork() == 0: {more}os.open({str(tmp_path / 'end')!r}, os.O_RDONLY); os._exit(0)\n    time.sleep(600)"
    reward = reward_of(tmp_path, body, seconds=1)
    with ThreadPoolExecutor(1) as pool:
        try:
            score = pool.submit(score_of, reward).result(20)
        finally:
            with suppress(OSError):  # nobody reads it where the child has ended
                os.close(os.open(tmp_path / "end", os.O_WRONLY | os.O_NONBLOCK))
    stop(reward.idle.get().process)
    assert (score.value, score.note, score.again) == (None, "rule took longer than 1 s", True)


def test_what_a_function_starts_ends_with_its_call(tmp_path):
    os.mkfifo(tmp_path / "pid")
    body = f"os.fork() or open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)"
    reward = reward_of(tmp_path, body, seconds=2)
    with ThreadPoolExecutor(1) as pool:
        score = pool.submit(score_of, reward)
        child = os.pidfd_open(int((tmp_path / "pid").read_text()))
        assert score.result(20).again
    ended, _, _ = select.select([child], [], [], 20)
    if not ended:
        signal.pidfd_send_signal(child, signal.SIGKILL)
    os.close(child)
    stop(reward.idle.get().process)
    assert ended, "the child lives on"


@pytest.mark.parametrize(
    ("body", "value", "note"),
    [
        ("return [len(input()), 2]", None, "rule raised EOFError"),
        ("import subprocess; return [len(subprocess.check_output(['cat'])), 2]", 0, None),
        ("exec('exit()')", None, "rule raised SystemExit"),
        ("return [2 - (os.fork() > 0), 2]", 1, None),
    ],
    ids=["reads", "a command that reads", "exits", "a child that goes on"],
)
def test_what_a_function_runs_meets_neither_the_requests_nor_the_answers(tmp_path, body, value, note):
    reward = reward_of(tmp_path, body)
    found = [score_of(reward) for _ in range(2)]
    stop(reward.idle.get().process)
    assert [(score.value, score.note, score.again) for score in found] == [(value, note, False)] * 2


def test_ctrl_c_does_not_wait_for_the_calls_of_a_function(tmp_path):
    os.mkfifo(tmp_path / "pids")
    body = f"open({str(tmp_path / 'pids')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    source, scorer = write(tmp_path / "in.jsonl", [GOOD] * 4), function_file(tmp_path, body)
    values = {"dataset_name_or_path": source, "output_dir": tmp_path / "o.jsonl", "scorer": scorer, "workers": 1}
    program = start(*command(REWARDS, timeout=300, **values)[1:], env=environment())
    assert (tmp_path / "pids").read_text()
    os.kill(program.pid, signal.SIGINT)
    program.join(60)
    ended = program.exitcode
    program.kill()
    assert ended == 130


def test_a_worker_that_has_died_between_two_calls_is_replaced(tmp_path):
    reward = reward_of(tmp_path, "return [1, 2]")
    worker = reward.idle.get()
    worker.process.kill()
    worker.process.wait()
    reward.idle.put(worker)
    with pytest.raises(InputError, match="ended its process"):
        score_of(reward)
    assert score_of(reward).value == 1
    stop(reward.idle.get().process)


@pytest.mark.parametrize("label", [2**70, "\ud800"], ids=["a large integer", "half of a surrogate pair"])
def test_a_record_that_a_worker_cannot_be_sent_costs_no_worker(tmp_path, label):
    reward = reward_of(tmp_path, "return [1, 2]")
    with pytest.raises(InputError, match=r"f:1: prompt a: .*rules\.py:rule: cannot be given this record"):
        score_of(reward, label=label)
    assert reward.idle.qsize() == 1 and score_of(reward, label=1).value == 1
    stop(reward.idle.get().process)


def test_a_file_that_cannot_be_imported_again_for_a_while_gives_scores_once_it_can(tmp_path):
    reward = reward_of(tmp_path, "return time.sleep(600) if records[0]['id'] == 'slow' else [1, 2]", seconds=1)
    rules = tmp_path / "rules.py"
    good = rules.read_text()
    rules.write_text("import no_such_module\n")
    slow, broken = score_of(reward, id="slow"), score_of(reward)
    rules.write_text(good)
    found = [score_of(reward) for _ in range(2)]  # the worker that is there may have met the broken file
    stop(reward.idle.get().process)
    assert slow.again and slow.note == "rule took longer than 1 s"
    assert broken.again and "could not import" in broken.note and "No module named 'no_such_module'" in broken.detail
    assert found[1].value == 1


def test_several_scorers_are_weighed(annotated, models, tmp_path):
    source, plain = annotated
    out = tmp_path / "o.jsonl"
    brief = function_file(tmp_path, "return [-len(response) for response in responses]")
    values = {"dataset_name_or_path": source, "output_dir": out, "weights": [2, 0.01], "plot": True}
    run(REWARDS, scorer=[f"bt:{models / 'rm'}", f"brief={brief}"], **values)
    for record, bt in zip(read(out), read(plain), strict=True):
        assert record["rewards_by"]["bt"] == pytest.approx(bt["rewards"], abs=1e-5)
        assert record["rewards_by"]["brief"] == [-len(response) for response in record["responses"]]
        expected = [2 * a + 0.01 * b for a, b in zip(*record["rewards_by"].values(), strict=True)]
        assert record["rewards"] == pytest.approx(expected)
    assert set(json.loads(Path(f"{out}.summary.json").read_text())) == {"rewards", "bt", "brief", "records", "noted"}
    assert Path(f"{out}.png").read_bytes().startswith(b"\x89PNG")


def test_a_pair_model_scores_by_mean_probability_to_win(models, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = generated(3)
    records[2]["responses"][1] = records[2]["responses"][0]
    source, out = write(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl"
    run(REWARDS, dataset_name_or_path=source, output_dir=out, scorer=f"pair:{models / 'lm'}")
    model = AutoModelForCausalLM.from_pretrained(models / "lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "lm")

    def first_wins(prompt, a, b):
        text = f"[CONTEXT] \n\n\n<turn> user\n {prompt}\n\n\n [RESPONSE A] {a} [RESPONSE B] {b} \n"
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            logits = model(ids).logits[0, -1, tokenizer.convert_tokens_to_ids(["A", "B"])]
        return logits.softmax(-1)[0].item()

    for record in read(out):
        prompt, texts = record["prompt"][0]["content"], record["responses"]
        for i, score in enumerate(record["rewards"]):
            wins = [
                (first_wins(prompt, texts[i], b) + 1 - first_wins(prompt, b, texts[i])) / 2
                for j, b in enumerate(texts)
                if j != i
            ]
            assert score == pytest.approx(sum(wins) / len(wins), abs=1e-5)
        assert sum(record["rewards"]) == pytest.approx(len(texts) / 2, abs=1e-5)
    twins = read(out)[2]["rewards"]
    assert twins[0] == pytest.approx(twins[1], abs=1e-5)
    run(REWARDS, 2, dataset_name_or_path=source, output_dir=tmp_path / "two.jsonl", scorer=f"pair:{models / 'lm'}")
    assert rewards_in(tmp_path / "two.jsonl") == pytest.approx(rewards_in(out), abs=1e-5)


def test_a_model_with_its_own_code_runs_only_when_allowed(annotated, models, tmp_path):
    import shutil

    folder = shutil.copytree(models / "rm", tmp_path / "own")
    (folder / "own_model.py").write_text(
        "from transformers import LlamaForSequenceClassification\n\n"
        "class OwnModel(LlamaForSequenceClassification):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        output = super().forward(*args, **kwargs)\n"
        "        output.score = output.logits[:, 0] * 2\n"
        "        return output\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "own_model.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_words.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\nclass OwnWords(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnWords", "auto_map": {"AutoTokenizer": [None, "own_words.OwnWords"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source, plain = annotated
    out = tmp_path / "o.jsonl"
    values = {"dataset_name_or_path": source, "output_dir": out, "scorer": f"custom:{folder}"}
    assert "--trust_remote_code" in run(REWARDS, code=2, **values)
    run(REWARDS, trust_remote_code="true", **values)
    assert rewards_in(out) == pytest.approx([2 * reward for reward in rewards_in(plain)], abs=1e-4)


def test_bad_scorers_are_refused_before_anything_runs(models, tmp_path):
    source = write(tmp_path / "in.jsonl", [GOOD])
    rules = tmp_path / "rules.py"
    rules.write_text("def rule(prompts, responses, records):\n    return [0] * len(prompts)\n")
    rule = f"function:{rules}:rule"
    broken = tmp_path / "broken.py"
    broken.write_text("def rule(prompts, responses, records): pass\nreturn 1\n")
    for changes, message in [
        ({"scorer": "somewhere"}, "expected [NAME=]KIND:TARGET, with KIND one of bt, vllm, pair, process, custom, function"),
        ({"scorer": f"fn:{rules}:rule"}, "no kind `fn`; expected [NAME=]KIND:TARGET, with KIND one of bt, vllm"),
        ({"scorer": f"btt:{models / 'rm'}"}, "did you mean `bt`?"),
        ({"scorer": [rule, rule]}, "another one is called function already"),
        ({"scorer": rule, "weights": [1, 2]}, "2 weights for 1 scorers"),
        ({"scorer": f"function:{tmp_path}/absent.py:rule"}, "absent.py: No such file"),
        ({"scorer": f"function:{rules}:rules"}, "defines no function rules, only: rule"),
        ({"scorer": "http:localhost:5000"}, "begins with http://"),
        ({"scorer": "judge:http://localhost:5000/v1"}, "--judge_model"),
        ({"scorer": "judge:http://localhost:5000/v1", "judge_model": "j", "rubric": "absent.txt"}, "absent.txt: no such file"),
        ({"scorer": f"bt:{models / 'lm'}"}, "not a Bradley-Terry reward model"),
        ({"scorer": rule, "K": 3}, "2 `responses`, but --K 3"),
        ({"scorer": f"function:{broken}:rule"}, "broken.py:2: 'return' outside function"),
    ]:
        log = run(REWARDS, code=2, dataset_name_or_path=source, output_dir=tmp_path / "o.jsonl", check="true", **changes)
        assert message in log
        assert [path.name for path in tmp_path.glob("o.jsonl*")] == []
    (tmp_path / "more.py").write_text("from rules import rule\nraised = 1 / 0\nother = rule\n")
    for name in ("rule", "other"):  # and nothing of the file is run
        scorer = f"function:{tmp_path}/more.py:{name}"
        log = run(REWARDS, dataset_name_or_path=source, output_dir=tmp_path / "o.jsonl", scorer=scorer, check="true")
        assert "o.jsonl: starting" in log and not list(tmp_path.glob("o.jsonl*"))
    single = write(tmp_path / "single.jsonl", [{**GOOD, "responses": ["a"]}])
    pair = f"pair:{models / 'lm'}"
    log = run(REWARDS, code=2, dataset_name_or_path=single, output_dir=tmp_path / "o.jsonl", scorer=pair)
    assert "single.jsonl:1: a pairwise scorer needs at least 2" in log


def gsm8k_records():
    """The test set's questions, each with its worked answer and the same with one digit of the result altered."""
    import gzip

    path = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl.gz"
    if not path.exists():
        pytest.skip("the GSM8K data is not on this machine")
    for number, line in enumerate(gzip.decompress(path.read_bytes()).splitlines()):
        problem = json.loads(line)
        work, result = problem["answer"].rsplit("#### ", 1)
        places = [i for i, letter in enumerate(result) if letter.isdigit()]
        place = places[number % len(places)]
        altered = result[:place] + str((int(result[place]) + 1 + number % 9) % 10) + result[place + 1 :]
        responses = [problem["answer"], f"{work}The answer is ${result}.", f"{work}#### {altered}"]
        yield {"prompt": problem["question"], "answer": problem["answer"], "responses": responses}


def test_the_gsm8k_rule_rewards_every_worked_answer_and_no_altered_one(tmp_path):
    source, out = write(tmp_path / "in.jsonl", gsm8k_records()), tmp_path / "o.jsonl"
    scorer = f"function:{ROOT}/docs/examples/gsm8k_reward.py:gsm8k_reward"
    run(REWARDS, dataset_name_or_path=source, output_dir=out, scorer=scorer)
    assert [record["rewards"] for record in read(out)] == [[1.0, 1.0, 0.0]] * 1319
