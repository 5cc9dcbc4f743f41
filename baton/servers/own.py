"""Servers that a program owns: they start with it, end with it (even when it is killed), and can be started anew.

    policy = own.policy_servers("runs/sft", [["0"], ["1"]], {"dtype": "bfloat16"}, weights=True)
    reward = own.reward_server(["--reward_name_or_path", "runs/rm"], gpus=["2"])
    with own.running([*policy, reward], folder) as servers:
        …
        own.restart(servers[0])

A program has one such context at a time; logs and state of its servers are in `folder`.
"""

import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton import program
from baton.launch.unit import ROOT
from baton.sampling import seed_from
from baton.servers import processes
from baton.servers.processes import HERE, Place

log = logging.getLogger("baton")

START_SECONDS = 1800
GUARD = "baton.servers.guard.Guard"
WEIGHTS = "baton.servers.vllm_weights"
REWARD_PROGRAM = str(ROOT / "annotate_data/serve_rm.py")


@dataclass(frozen=True)
class Wanted:
    """A server to start, by the words after `python`; `--host` and `--port` are added to them.

    `what` it serves stands in messages: a model's name or path. `gpus` are their ids, none on a CPU. `variables` are added to
    its environment variables. A request needs the `api_key`, if there is one.
    """

    what: str
    words: tuple[str, ...]
    gpus: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class OwnServer:
    """A server that was started here, and what starts it anew; `url` is its address, without the /v1 of a vLLM server."""

    wanted: Wanted
    port: int
    starter: ThreadPoolExecutor = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://{HERE}:{self.port}"

    @property
    def api_key(self) -> str | None:
        return self.wanted.api_key


def policy_servers(
    model: str,
    gpus: Sequence[Sequence[str]],
    settings: Mapping[str, Any],
    *,
    weights: bool = False,
    api_key: str | None = None,
    seed: int = 0,
) -> list[Wanted]:
    """vLLM servers of a model, one on each of the groups of GPU ids in `gpus`; an empty group stands for the CPU.

    `settings` are vLLM's, by their names with `_` for `-`. With `weights` the servers take other weights while they run: see
    weights.py. Without an `api_key` one is made up, which all of them share; with an empty one requests need none. Each draws
    random numbers of its own, by the `seed`, for requests without one: vLLM's servers would all draw the same.
    """
    model = os.path.realpath(model) if Path(model).exists() else model
    key = secrets.token_urlsafe(32) if api_key is None else api_key or None
    settings, variables = dict(settings), {"VLLM_API_KEY": key or ""}
    if key:
        settings["middleware"] = GUARD
    if weights:
        settings["worker_extension_cls"] = f"{WEIGHTS}.Extension"
        settings["weight_transfer_config"] = json.dumps({"backend": "baton"})
        variables["VLLM_SERVER_DEV_MODE"] = "1"
    wanted = []
    for number, group in enumerate(gpus):
        options, more = processes.engine_options(settings | {"seed": seed_from(seed, number)}, len(group), len(gpus))
        words = (*processes.VLLM, "--model", model, *options)
        wanted.append(Wanted(model, words, tuple(group), variables | more, key))
    return wanted


def reward_server(options: Sequence[str], gpus: Sequence[str] = (), api_key: str | None = None) -> Wanted:
    """A reward model's server, by the options of annotate_data/serve_rm.py but --host and --port.

    Without an `api_key` it asks for the one in $REWARD_API_KEY, if there is one.
    """
    variables = {"REWARD_API_KEY": api_key} if api_key else {}
    return Wanted("the reward model", (REWARD_PROGRAM, *options), tuple(gpus), variables, api_key)


@contextmanager
def running(wanted: Sequence[Wanted], folder: Path, timeout: float = START_SECONDS) -> Iterator[list[OwnServer]]:
    """Context in which these servers run, on free ports of this machine: all of them are ready where it begins.

    Raises UnitFailed with the end of its log if a server ends or is not ready after `timeout` seconds, InputError if the
    inference environment is missing.
    """
    os.environ["BATON_SERVERS"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    processes.stop(processes.known())  # what a program that was killed has left
    # Linux ends a server with the thread that has started it: that one lives as long as this context.
    with free_ports(len(wanted)) as ports, ThreadPoolExecutor(1, "servers") as starter:
        servers = [OwnServer(one, port, starter) for one, port in zip(wanted, ports, strict=True)]
        try:
            for server in servers:
                _start(server)
            log.info("servers start: %d; it may take minutes; logs: %s/PORT.log", len(servers), folder)
            for ready in processes.wait_until_ready(ports, ports, timeout):
                log.info("%s", processes.describe(ready))
            yield servers
        finally:
            processes.stop(processes.known())
    shutil.rmtree(folder)


def restart(*servers: OwnServer, timeout: float = START_SECONDS) -> None:
    """End servers, if they still run, and start them anew on their ports, with the models of their beginning, all at once.

    Returns once they are ready. What one logged before is in PORT.log.before. From any thread. Raises what `running` raises.
    """
    found = [known for server in servers if (known := processes.find(server.port))]
    processes.stop(found)
    for known in found:
        if known.log.exists():
            known.log.replace(f"{known.log}.before")
    for server in servers:
        log.warning("%s: the server on port %d starts anew", server.wanted.what, server.port)
        _start(server)
    ports = [server.port for server in servers]
    for ready in processes.wait_until_ready(ports, ports, timeout):
        log.info("%s", processes.describe(ready))


def is_alive(server: OwnServer) -> bool:
    """Whether the server's process still runs."""
    found = processes.find(server.port)
    return found is not None and processes.is_alive(found)


def _start(server: OwnServer) -> None:
    wanted, place = server.wanted, Place(HERE, server.port)
    variables = {**wanted.variables, program.PARENT: str(os.getpid())}
    if wanted.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(wanted.gpus)
    server.starter.submit(processes.start_words, place, wanted.what, wanted.words, variables).result()


@contextmanager
def free_ports(count: int) -> Iterator[list[int]]:
    """Ports that no other program is given meanwhile: they stay bound here, where a server may listen all the same."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind((HERE, 0))
        yield [each.getsockname()[1] for each in sockets]
