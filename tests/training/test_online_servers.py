"""How an online training deals with its servers: requests in flight, connections, addresses, random numbers."""

import json
import socket
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import psutil
import pytest

from baton.errors import InputError
from baton.launch import gpus
from baton.online.engines import meeting_place, reward_gpus, server_gpus
from baton.servers import own, weights
from baton.servers.rollouts import Rollouts
from baton.servers.weights import Transfer


def test_servers_of_their_own_gpus_take_none_that_training_has_and_the_reward_server_none_of_theirs(monkeypatch):
    monkeypatch.setattr(gpus, "visible", lambda: ["0", "1", "2", "3"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    wanted = SimpleNamespace(server_gpus="2, 3", reward_gpus=None, num_servers=2, tensor_parallel_size=1)
    assert server_gpus(wanted) == [["2"], ["3"]] and reward_gpus(wanted) == ["1"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match="`server_gpus`: training takes GPU 2, 3 too: give it others"):
        server_gpus(wanted)
    wanted.server_gpus = None  # then they are shared
    assert server_gpus(wanted) == [["0"], ["1"]] and reward_gpus(wanted) == ["3"]


class Slow(BaseHTTPRequestHandler):
    """A server that takes its time for each request for responses, and notes how many it has at once, and on which ports.

    It answers none before it has had `wanted` at once, as long as 5 seconds.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.say({"data": [{"id": "model", "max_model_len": 99}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            self.server.ports.append(self.client_address[1])
        until = time.monotonic() + 5
        while self.server.most < self.server.wanted and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05 * bool(body))
        with self.server.lock:
            self.server.now -= 1
        one = {"text": "text", "finish_reason": "stop", "token_ids": [1], "logprobs": {"token_logprobs": [0.0]}}
        self.say({"choices": [one] * body.get("n", 0)})

    def say(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Say nothing on the test's terminal."""


@pytest.fixture
def slow():
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        server.daemon_threads, server.lock, server.ports = True, threading.Lock(), []
        server.now = server.most = server.wanted = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(("n", "most"), [(1, 8), (4, 2), (8, 2)])
def test_so_many_responses_are_in_flight_at_a_server_and_two_requests_at_least(slow, n, most):
    slow.wanted = most
    with Rollouts([f"http://127.0.0.1:{slow.server_port}"], None, per_server=8) as rollouts:
        found = dict(rollouts.sample([[1]] * 20, n, {"max_tokens": 8}, range(20)))
    assert len(found) == 20 and slow.most == most


def test_a_connection_that_a_server_may_be_closing_is_not_used_for_weights(slow, monkeypatch):
    monkeypatch.setattr(weights, "IDLE_SECONDS", 0.1)
    with closing(Transfer([f"http://127.0.0.1:{slow.server_port}"], None)) as transfer:
        for seconds in (0, 0.2, 0):
            time.sleep(seconds)
            transfer.wake()
    first, second, third = slow.ports
    assert first != second == third


def test_servers_of_other_machines_meet_the_trainer_where_they_reach_it():
    assert meeting_place(["http://127.0.0.1:8000", "http://localhost:8001/v1"]) == "127.0.0.1"
    addresses = (each.address for all_of in psutil.net_if_addrs().values() for each in all_of if each.family == socket.AF_INET)
    for address in addresses:
        if not address.startswith("127."):
            assert meeting_place(["http://127.0.0.1:8000", f"http://{address}:8000"]) == address


def test_each_server_of_a_policy_has_random_numbers_of_its_own():
    wanted = [*own.policy_servers("some/model", [[], []], {}, seed=1), *own.policy_servers("some/model", [[]], {}, seed=2)]
    assert len({each.words[each.words.index("--seed") + 1] for each in wanted}) == 3
