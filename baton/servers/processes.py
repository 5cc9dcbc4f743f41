"""vLLM servers that run on this machine, as processes with a state on disk: start, find, wait for and stop them.

Each has three files in `folder()`: PORT.pid (pid and start time), PORT.what (host and model; options and the state of the
model's files) and PORT.log. A fourth, PORT.refused, is there where the last call wanted something else on the port: clients,
whose caller may not know, refuse too.
"""

import errno
import http.client
import json
import os
import shlex
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from baton import launch
from baton.errors import InputError, UnitFailed
from baton.fingerprint import state
from baton.launch import Process, Unit, processes
from baton.launch.unit import ROOT, end_of_log, refuse_secrets
from baton.locks import Lock

POLL_SECONDS = 0.5
HERE = "127.0.0.1"
SERVE = Path(__file__).with_name("serve.py")  # started with -P: its folder is no place to import from
VLLM = ("-P", str(SERVE))

# On a CPU statistics, which bare vLLM does not count either, would cost a tenth of the speed. Each engine is one process, where
# one core is enough: as two, the one would spin while the other works.
CPU_OPTIONS = ["--enforce-eager", "--disable-log-stats"]
ONE_PROCESS = ["--distributed-executor-backend", "uni"]
# vLLM 0.32 dies on a CPU of a prompt that is computed in parts whose request has a seed ("CPU Generator does not use offset").
WHOLE_PROMPTS = ["--no-enable-chunked-prefill"]


class Place(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


class Server(NamedTuple):
    """A server that was started here: it may run, or have ended.

    `options` are words for vLLM, `state` is what the model's files were when it was started (None: not known).
    """

    place: Place
    model: str
    process: Process
    options: list[str]
    state: str | None

    @property
    def port(self) -> int:
        return self.place.port

    @property
    def log(self) -> Path:
        return folder() / f"{self.port}.log"


def folder() -> Path:
    """Where logs and state are: $BATON_SERVERS, or .servers/HOST/ in the project, which several machines may share."""
    return Path(os.environ.get("BATON_SERVERS") or ROOT / ".servers" / socket.gethostname())


def known() -> list[Server]:
    """The servers that were started here and not stopped, by port."""
    ports = sorted(int(path.stem) for path in folder().glob("*.pid") if path.stem.isdigit())
    return [server for port in ports if (server := find(port))]


def find(port: int) -> Server | None:
    """The server that was started on a port; None if none was."""
    try:
        pid, started = _file(port, "pid").read_text().split()
        what, made_of = _file(port, "what").read_text().splitlines()
        host, model = what.split(" ", 1)
        options, files = json.loads(made_of)
    except (FileNotFoundError, ValueError):  # or one that was stopped or started by half
        return None
    return Server(Place(host, port), model, Process(int(pid), int(started)), options, files)


def is_alive(server: Server) -> bool:
    return processes.is_alive(server.process)


def is_ready(place: Place) -> bool:
    """Whether something answers /health there as a ready server does."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(place.host, place.host)
    connection = http.client.HTTPConnection(host, place.port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_taken(place: Place) -> bool:
    """Whether a program listens there. Raises InputError for a host that has no address."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"--host {place.host}: {error.strerror}") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of one that has ended do not count
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def describe(server: Server) -> str:
    """One line about a server: port, pid, state, model, log."""
    state = "dead" if not is_alive(server) else "ready" if is_ready(server.place) else "starting"
    return f"port {server.port}  pid {server.process.pid}  {state:8}  {server.model}  log {server.log}"


def check_not_refused(ports: Iterable[int]) -> None:
    """Raise InputError if the last call that was to start a server on one of these ports wanted something else there."""
    for port in ports:
        server, refusal = find(port), _file(port, "refused")
        if server and is_alive(server) and refusal.exists():
            raise InputError(f"{refusal.read_text()}; then start the servers again")


def runs_already(place: Place, model: str, options: Sequence[str]) -> bool:
    """Whether a server that was started here runs on the port, with this model and these options; what is left of a dead one is
    removed.

    Raises InputError if the port serves another model, this one as it was before its files changed or with other options, or is
    taken by another program.
    """
    server = find(place.port)
    if server and is_alive(server):
        if differs := _difference(server, model, options):
            refusal = f"port {place.port} already serves {differs}; `register_server.sh --stop` ends it"
            _file(place.port, "refused").write_text(refusal)
            raise InputError(refusal)
        _file(place.port, "refused").unlink(missing_ok=True)
        return True
    if server:
        stop([server])
    if is_taken(place):
        raise InputError(f"port {place.port} is taken by a server that was not started here; choose another --port")
    return False


def _difference(server: Server, model: str, options: Sequence[str]) -> str | None:
    """What a server serves, and that it is not what is wanted; None if it is."""
    if server.model != model:
        return f"{server.model}, not {model}"
    if server.options != list(options):
        return f"{model} with the options {shlex.join(server.options)}, not {shlex.join(options)}"
    now = state(model)
    # Of a model of the hub nothing was known before it was loaded here for the first time.
    if server.state and now and server.state != now:
        return f"{model} as it was before its files changed"
    return None


def start_missing(
    places: Sequence[Place], model: str, options: Sequence[str], gpus: int, variables: Mapping[str, str]
) -> list[int]:
    """Start a server at each place where none runs yet, each on so many GPUs; returns the ports of those that were started.

    All places are checked before the first server starts. Calls at the same time, which wait for each other, start one once.
    Raises InputError as `runs_already` does, and for a secret among the options, which messages and files show.
    """
    refuse_secrets(f"the servers of {model}", options)
    folder().mkdir(parents=True, exist_ok=True)
    with Lock(folder() / "lock"):
        missing = [(slot, place) for slot, place in enumerate(places) if not runs_already(place, model, options)]
        for slot, place in missing:
            start(place, model, options, gpus, slot, variables)
    return [place.port for _, place in missing]


def start(place: Place, model: str, options: Sequence[str], gpus: int, slot: int, variables: Mapping[str, str]) -> Server:
    """Start a server, which outlives this process, on the `slot`-th group of so many GPUs; it is not ready yet."""
    # Without a seed vLLM's servers all draw the same random numbers.
    words = (*VLLM, "--model", model, "--seed", str(slot), *options)
    return start_words(place, model, words, variables, gpus, slot, (list(options), state(model)))


def start_words(
    place: Place,
    what: str,
    words: Sequence[str],
    variables: Mapping[str, str],
    gpus: int = 0,
    slot: int = 0,
    made_of: tuple[list[str], str | None] = ([], None),
) -> Server:
    """Start the server that these words after `python` start, with --host and --port added, and note `what` it serves.

    `made_of` are `options` and `state` of the `Server`, where a later call is to compare them.
    """
    unit = Unit(
        name=f"the server on port {place.port}",
        environment="inference",
        program=(*words, "--host", place.host, "--port", str(place.port)),
        gpus=gpus,
        log=_file(place.port, "log"),
        variables=variables,
    )
    process = launch.start(unit, slot)
    _file(place.port, "what").write_text(f"{place.host} {what}\n{json.dumps(made_of)}\n")
    _file(place.port, "pid").write_text(f"{process.pid} {process.started}\n")
    return Server(place, what, process, *made_of)


def engine_options(settings: Mapping[str, Any], gpus: int, servers: int) -> tuple[list[str], dict[str, str]]:
    """The words of vLLM's command line, and environment variables, for each of several servers on this machine.

    `settings` are values by vLLM's names, with `_` for `-`; those that are None are left out. `gpus` is how many GPUs each of
    the servers has, 0 on a CPU.
    """
    options = ["--disable-uvicorn-access-log"]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            options += [f"--{flag}", str(value)]
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    if gpus:
        return options, variables
    options += CPU_OPTIONS
    options += ONE_PROCESS if (settings.get("tensor_parallel_size") or 1) == 1 else []
    options += [] if settings.get("max_num_batched_tokens") else WHOLE_PROMPTS  # which may be too few for a whole one
    return options, variables | cpu_variables(servers)


def cpu_variables(servers: int) -> dict[str, str]:
    """Environment variables for each of several servers that share the cores; no thread is bound to a core or spins.

    Nothing is compiled, as `CPU_OPTIONS` say: log-probabilities alone would be, which needs a compiler.
    """
    threads = max(len(os.sched_getaffinity(0)) // servers, 1)
    chosen = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1"}
    chosen = {name: os.environ.get(name) or value for name, value in chosen.items()}
    chosen |= {"OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    return chosen | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def wait_until_ready(ports: Iterable[int], started: Sequence[int], timeout: float) -> Iterator[Server]:
    """The servers on `ports` in turn, each once it is ready; those on the ports `started` are ended if one has ended or takes
    longer than `timeout` seconds.

    Raises UnitFailed with exit code 1 and the end of that one's log.
    """
    begin = time.monotonic()
    for port in ports:
        while not ((server := find(port)) and is_ready(server.place)):
            for other in {*started, port}:
                if not ((waited_for := find(other)) and is_alive(waited_for)):
                    _give_up(other, "the server has ended", started)
            if time.monotonic() - begin > timeout:
                _give_up(port, f"not ready after {timeout:g} s", started)
            time.sleep(POLL_SECONDS)
        yield server


def stop(servers: Iterable[Server]) -> None:
    """End servers, each with all its processes; by force what has not gone after 20 s."""
    servers = list(servers)
    processes.end(server.process for server in servers)
    for server in servers:
        for kind in ("pid", "what", "refused"):
            _file(server.port, kind).unlink(missing_ok=True)


def _give_up(port: int, reason: str, started: Sequence[int]) -> None:
    log = _file(port, "log")
    tail = end_of_log(log)
    stop(server for other in started if (server := find(other)))
    raise UnitFailed("\n".join([f"port {port}: {reason}; the end of {log}:", *tail]), 1)


def _file(port: int, kind: str) -> Path:
    return folder() / f"{port}.{kind}"
