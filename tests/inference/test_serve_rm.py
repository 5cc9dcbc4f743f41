"""A service of several scorers: what it answers is what get_rewards.py writes; failures keep their meaning over HTTP."""

import itertools
import json
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from annotate_data.reward_requests import tasks_of
from annotate_data.reward_service import Request, score_together
from annotate_data.work import Responses, Score
from baton.errors import FailuresListed, InputError
from baton.servers.rewards import Rewards
from tests.inference.annotation_task import command, environment, generated, make_models, read, run, write
from tests.programs import start

RULE = """
import time

def rule(prompts, responses, records):
    for response in responses:
        if response == "raise":
            raise ValueError("no way")
        if response == "sleep":
            time.sleep(600)
        if response == "nan":
            return [float("nan")] * len(responses)
    return [
        len(prompt[0]["content"]) + len(response) + 1000 * record.get("label", 0) + record.get("source", {}).get("number", 0)
        for prompt, response, record in zip(prompts, responses, records)
    ]
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """The flags of three scorers with weights: a reward model, a function, and a pairwise model."""
    folder = make_models(tmp_path_factory.mktemp("models"))
    (folder / "rules.py").write_text(RULE)
    words = [f"bt:{folder / 'rm'}", f"rule=function:{folder / 'rules.py'}:rule", f"pair:{folder / 'lm'}"]
    return {"scorer": words, "weights": [2, 0.01, -1], "dtype": "float32"}


@pytest.fixture(scope="module")
def service(scorers, tmp_path_factory):
    """The URL of a running service of these scorers, whose key is `secret`."""
    port, log = free_port(), tmp_path_factory.mktemp("log")
    words = command("serve_rm.py", port=port, timeout=1, workers=2, **scorers)[1:]
    process = start(*words, env=environment() | {"REWARD_API_KEY": "secret"}, output=str(log))
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            process.join(0.2)
            assert process.exitcode is None, (log / "stderr").read_text()
        yield f"http://127.0.0.1:{port}/get_reward"
    finally:
        process.terminate()
        process.join(30)


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def ask(url, body):
    answer = httpx.post(url, json=body, headers={"Authorization": "Bearer secret"}, timeout=60)
    return answer.status_code, answer.json()


def conversation(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def test_records_that_arrive_together_get_what_get_rewards_writes(scorers, service, tmp_path):
    source, out = write(tmp_path / "in.jsonl", [{**r, "label": i} for i, r in enumerate(generated(12))]), tmp_path / "o.jsonl"
    run("get_rewards.py", dataset_name_or_path=source, output_dir=out, **scorers)
    client = Rewards([service], "secret")
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(client.score, [record for _, record in Responses(str(source))]))
    for record, scored in zip(read(out), found, strict=True):
        assert scored.rewards == pytest.approx(record["rewards"], abs=1e-4)
        assert set(scored.by) == {"bt", "rule", "pair"} and scored.by["rule"] == record["rewards_by"]["rule"]
        for name, values in record["rewards_by"].items():
            assert scored.by[name] == pytest.approx(values, abs=1e-4)


def test_get_rewards_takes_the_weighted_sums_of_the_service(scorers, service, tmp_path):
    source = write(tmp_path / "in.jsonl", generated(4))
    for name, flags in (("direct", scorers), ("served", {"scorer": f"http:{service}", "api_key": "secret"})):
        run("get_rewards.py", dataset_name_or_path=source, output_dir=tmp_path / name, **flags)
    for direct, served in zip(read(tmp_path / "direct"), read(tmp_path / "served"), strict=True):
        assert served["rewards"] == pytest.approx(direct["rewards"], abs=1e-4)


def test_a_request_of_several_prompts_is_answered_in_its_order(service):
    pairs = [("Why?", "a"), ("Why?", "bb"), ("How?", "ccc"), ("How?", "dd")]
    status, answer = ask(service, {"messages": [conversation(*pair) for pair in pairs], "labels": [0, 0, 1, 1]})
    assert status == 200
    assert answer["rewards_by"]["rule"] == [5, 6, 1007, 1006]
    wins = answer["rewards_by"]["pair"]
    assert sum(wins[:2]) == pytest.approx(1, abs=1e-5) and sum(wins[2:]) == pytest.approx(1, abs=1e-5)
    assert answer["rewards"] == pytest.approx(
        [2 * bt + 0.01 * rule - pair for bt, rule, pair in zip(*answer["rewards_by"].values(), strict=True)]
    )


def test_a_text_that_a_client_has_written_is_read_as_it_is(service):
    turns = [conversation("Why?", "a"), conversation("Why?", "bb")]
    written = [[f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in turn] for turn in turns]
    prompt = written[0][0] + "<|im_start|>assistant\n"
    query = [prompt + f"{response}<|im_end|>" for response in ("a", "bb")]
    assert query == ["".join(each) for each in written]
    _, as_messages = ask(service, {"messages": turns})
    status, as_texts = ask(service, {"query": query, "prompts": [prompt] * 2})
    assert status == 200
    assert as_texts["rewards_by"]["bt"] == pytest.approx(as_messages["rewards_by"]["bt"], abs=1e-5)
    assert as_texts["rewards_by"]["rule"] == [len(text) for text in query]


@pytest.mark.parametrize(
    ("response", "status", "reason"),
    [
        ("raise", 422, "rule: response 1 of sample 1: rule raised ValueError"),
        ("nan", 422, "rule: response 1 of sample 1: gave nan, which is no score"),
        ("sleep", 408, "rule: response 1 of sample 1: rule took longer than 1 s"),
    ],
)
def test_what_gets_no_score_says_whether_another_try_may_help(service, response, status, reason):
    body = {"messages": [conversation("Why?", response), conversation("Why?", "fine")]}
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(ask, service, body)
        good = pool.submit(ask, service, {"messages": [conversation("How?", "a"), conversation("How?", "b")]})
        found, answer = bad.result()
    assert found == status and answer["detail"] == reason
    assert good.result()[0] == 200
    record = {"prompt": "Why?", "responses": [response, "fine"]}
    scored = Rewards([service], "secret", tries=1).score(record)
    assert scored.rewards is None and scored.again == (status == 408) and reason in scored.why + scored.detail


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "`query` must be a list"),
        ({"messages": "hello"}, "`messages` must be a list"),
        ({"messages": [[{"role": "assistant"}]]}, "messages[0]: `messages`: `content` must be a string"),
        ({"messages": [[{"role": "user", "content": "Why?"}]]}, "messages[0]: the last message must be the assistant's"),
        ({"messages": [conversation("Why?", "a")] * 2, "labels": [1]}, "`labels` must be a list with one entry for each"),
        ({"messages": [conversation("Why?", "a")] * 2, "records": [1]}, "`records` must hold objects"),
        ({"messages": [conversation("Why?", "a"), conversation("How?", "b")]}, "a pairwise scorer needs at least 2"),
        ({"messages": [conversation("Why?", "a")] * 2, "labels": [2**70] * 2}, "cannot be given this record"),
        ({"query": ["Why? a", "Why? b"]}, "`query` without `prompts`"),
        ({"query": ["Why? a", ""], "prompts": ["Why?", ""]}, "`query` must be a list of texts that are not empty"),
        ({"query": ["Why? a", "Why? b"], "prompts": ["Why?", "How?"]}, "query[1]: does not begin with prompts[1]"),
    ],
)
def test_a_bad_request_names_the_field(service, body, message):
    status, answer = ask(service, body)
    assert status == 422 and message in answer["detail"]


def test_a_wrong_key_and_a_service_that_is_away_are_errors(service):
    record = {"prompt": "Why?", "responses": ["a", "b"]}
    with pytest.raises(InputError, match="refuses the API key"):
        Rewards([service], "wrong").score(record)
    with pytest.raises(FailuresListed, match="Connection refused"):
        Rewards([f"http://127.0.0.1:{free_port()}/get_reward"], tries=1).score(record)


def test_a_service_of_another_kind_needs_to_know_rewards_alone():
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = b'{"rewards": [1.0, -2], "extra_logs": {"x": [1, 2]}}' if len(bodies) == 1 else b'{"rewards": [1, NaN]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Nothing is logged."""

    record = {"id": "x", "prompt": "Why? ", "responses": ["a", "b"], "response_token_ids": [[1], [2]], "label": 7}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = Rewards([f"http://127.0.0.1:{server.server_port}"])
        scored = client.score(record)
        with pytest.raises(InputError, match="prompt x: `rewards` holds nan"):
            client.score(record)
        server.shutdown()
    assert (scored.rewards, scored.by, scored.why) == ([1.0, -2.0], {}, "")
    assert bodies[0] == {
        "query": ["Why? a", "Why? b"],
        "prompts": ["Why? "] * 2,
        "labels": [7, 7],
        "messages": [conversation("Why? ", "a"), conversation("Why? ", "b")],
        "records": [{"id": "x", "label": 7}],
    }


@contextmanager
def answering(*answers):
    """A client, tried once a request, of a service that gives these (status, bytes) in turn."""
    left = iter(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status, content = next(left)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            """Nothing is logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Rewards([f"http://127.0.0.1:{server.server_port}"], tries=1)
        server.shutdown()


TWO = {"id": "x", "prompt": "Why?", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    "answer",
    [b"[1.0, 2.0]", b"null", b'"no"', b'{"rewards": [1, 2], "rewards_by": [1, 2]}', b'{"rewards": [1, 1' + b"0" * 400 + b"]}"],
    ids=["list", "null", "text", "scorers without names", "too large"],
)
def test_an_answer_of_another_shape_is_no_answer(answer):
    with answering((200, answer)) as client:
        scored = client.score(TWO)
    assert scored.rewards is None and scored.again and "not the expected answer" in scored.why


def test_requests_that_take_too_long_do_not_mean_that_the_service_is_away_but_failures_do():
    with answering(*[(408, b"slow")] * 4, (200, b'{"rewards": [1, 2]}'), *[(503, b"away")] * 3) as client:
        slow = [client.score(TWO) for _ in range(4)]
        assert all(scored.again and "status 408: slow" in scored.why for scored in slow)
        assert client.score(TWO).rewards == [1.0, 2.0]
        assert all(client.score(TWO).again for _ in range(2))
        with pytest.raises(FailuresListed, match="status 503: away"):
            client.score(TWO)


def test_an_answer_without_scorers_may_say_null_of_them():
    with answering((200, b'{"rewards": [1, 2], "rewards_by": null}')) as client:
        assert client.score(TWO) == ([1.0, 2.0], {}, "", False, "")


def test_a_bad_request_spoils_none_that_is_scored_with_it():
    def lengths(tasks):
        for task in tasks:
            for index in task.missing:
                if task.responses[index] == "refused":
                    raise InputError(f"{task.where}: the chat template refuses it")
                yield Score(task, index, float(len(task.responses[index])))

    positions = itertools.count()
    bodies = [{"messages": [conversation("Why?", response)]} for response in ("a", "refused", "ccc")]
    requests = [Request(lengths, tasks_of(body, positions, False, False), Future()) for body in bodies]
    score_together(lengths, requests)
    assert [requests[i].scores.result()[0].value for i in (0, 2)] == [1, 3]
    with pytest.raises(InputError, match="sample 1: the chat template refuses it"):
        requests[1].scores.result()


def test_scorers_are_checked_before_anything_is_loaded(scorers, tmp_path):
    log = run("serve_rm.py", check="true", **scorers)
    assert "would serve bt, rule, pair at http://127.0.0.1:5000/get_reward" in log
    assert "2 weights for 3 scorers" in run("serve_rm.py", code=2, **{**scorers, "weights": [1, 2]})
    assert "no kind `fn`" in run("serve_rm.py", code=2, scorer="fn:rules.py:rule")
    (tmp_path / "broken.py").write_text("import no_such_module\nrule = print\n")
    assert "No module named 'no_such_module'" in run("serve_rm.py", code=2, scorer=f"function:{tmp_path}/broken.py:rule")
