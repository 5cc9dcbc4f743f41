"""Models of the hub: what cannot be had is refused at once, by one message, and what is here needs no hub."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from baton import sources
from baton.errors import InputError
from baton.sources import check_hub, check_reward_model
from tests.programs import ROOT

URL = "/{repo_id}/resolve/{revision}/{filename}"


@contextmanager
def hub(status, code=None):
    """A hub that answers every request with one status and error code; yields its address and the requests it got."""
    requests = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Sets the hub's address, with an empty cache; returns the cache's folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    sources.leave_silent_hub.cache_clear()

    def set_hub(address):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + URL)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        return tmp_path

    return set_hub


def in_cache(cache, model, files):
    """Put files, by name with their content, into the cache as those of a model."""
    folder = cache / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("1" * 40)
    (folder / "snapshots" / ("1" * 40)).mkdir(parents=True)
    for name, content in files.items():
        (folder / "snapshots" / ("1" * 40) / name).write_text(content)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", r"granted access: ask for it at http://127.0.0.1:\d+/some/model, then log in with `.*/hf auth"),
        (403, "GatedRepo", "granted access"),
        (404, "RepoNotFound", "neither a folder here nor a model that the hub shows to you: correct the name"),
        (401, "RepoNotFound", "if it is private, log in with `.*/hf auth login`, or set HF_TOKEN"),
        (403, None, r"the hub refuses it \(status 403\): log in with"),
        (500, None, r"the hub at http://127.0.0.1:\d+ does not answer \(status 500\); check the network, or give a local"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_after_one_request(at, status, code, message):
    with hub(status, code) as (address, requests):
        at(address)
        with pytest.raises(InputError, match=f"^some/model: .*{message}"):
            check_hub("some/model")
    assert requests == ["/some/model/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "some/prompts: neither a file here nor a dataset that the hub shows to you: correct the name"),
        (403, "GatedRepo", r"granted access: ask for it at http://127.0.0.1:\d+/datasets/some/prompts, then log in"),
    ],
)
def test_a_dataset_that_the_hub_does_not_give_is_refused(at, status, code, message):
    with hub(status, code) as (address, requests):
        at(address)
        with pytest.raises(InputError, match=message):
            check_hub("some/prompts", kind="dataset")
    assert requests == ["/datasets/some/prompts/resolve/main/README.md"]


def test_a_hub_that_does_not_answer_for_a_dataset_is_a_warning_since_copies_are_kept_elsewhere(at, caplog):
    with hub(500) as (address, _):
        at(address)
        check_hub("some/prompts", kind="dataset")
    assert "some/prompts: not a file here, and the hub at" in caplog.text


def test_a_model_that_the_hub_gives_is_accepted(at):
    with hub(200) as (address, requests):
        at(address)
        check_hub("some/model")
    assert len(requests) == 1
    with hub(404, "EntryNotFound") as (address, _):  # an adapter has no config.json
        at(address)
        check_hub("some/adapter")


def test_a_hub_that_nobody_runs_or_that_never_answers_is_named(at, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(sources, "HUB_SECONDS", 0.2)
        with pytest.raises(InputError, match=r"some/model: .*does not answer \(.*; check the network, or give a local folder"):
            check_hub("some/model")
    with pytest.raises(InputError, match=r"some/model: .*does not answer"):
        check_hub("some/model")


def test_what_is_in_the_cache_is_loaded_without_the_hub_where_that_never_answers(at, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cache = at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(sources, "HUB_SECONDS", 0.2)
        in_cache(cache, "some/model", {"config.json": "{}", "model.safetensors": ""})
        check_hub("some/model", ahead=True)
        assert not os.environ["HF_HUB_OFFLINE"]
        check_hub("some/model")
    assert "the copies on this machine are used as they are" in caplog.text
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


READS_A_DATASET = """
from baton import sources
from baton.prompts import read_records
sources.HUB_SECONDS = 0.2
list(read_records("some/prompts"))
"""


def test_a_dataset_that_is_not_here_is_refused_at_once_where_the_hub_never_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        there = {
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", READS_A_DATASET]
        done = subprocess.run(command, env=os.environ | there, capture_output=True, text=True, timeout=60)
    assert "does not answer" in done.stderr and "some/prompts: neither a local file" in done.stderr


def test_what_is_in_the_cache_needs_no_hub(at):
    with hub(500) as (address, requests):
        cache = at(address)
        index = {"model.safetensors.index.json": json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})}
        in_cache(cache, "some/model", {"config.json": "{}", "model.safetensors": ""})
        in_cache(cache, "in/parts", {**index, "1.safetensors": "", "2.safetensors": ""})
        in_cache(cache, "half/there", {**index, "1.safetensors": "", "tokenizer_config.json": "{}"})
        check_hub("some/model")
        check_hub("in/parts")
        check_hub("half/there", weights=False)
        check_hub(str(cache))
        assert requests == ["/"]  # whether it answers at all
        for model in ("half/there", "not/there"):
            with pytest.raises(InputError, match=f"{model}: neither a folder here nor in the hub's cache"):
                check_hub(model)


def test_offline_a_model_that_is_not_in_the_cache_is_refused_without_a_request(at, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with hub(200) as (address, requests):
        in_cache(at(address), "some/model", {"tokenizer_config.json": "{}"})
        check_hub("some/model", weights=False)
        with pytest.raises(InputError, match="some/model: not in the hub's cache on this machine, and HF_HUB_OFFLINE is set"):
            check_hub("some/model")
    assert requests == []


def test_ahead_of_the_work_a_hub_that_cannot_be_asked_is_a_warning_and_a_refusal_an_error(at, caplog, monkeypatch):
    with hub(500) as (address, _):
        at(address)
        check_hub("some/model", ahead=True)
    with hub(404, "RepoNotFound") as (address, _):
        at(address)
        with pytest.raises(InputError, match="correct the name"):
            check_hub("some/model", ahead=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_hub("some/model", ahead=True)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 and "does not answer (status 500)" in said[0] and "HF_HUB_OFFLINE is set" in said[1]


def test_a_reward_model_without_weights_or_a_tokenizer_is_refused_before_anything_is_sampled(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["X"], "num_labels": 1}')
    for name, missing in (("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer")):
        with pytest.raises(InputError, match=missing):
            check_reward_model(str(tmp_path))
        (tmp_path / name).write_text("")
    check_reward_model(str(tmp_path))


def test_a_reward_model_with_half_a_config_is_bad_input(tmp_path):
    (tmp_path / "config.json").write_text('{"num_labels"')
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        check_reward_model(str(tmp_path))
