"""Start one vLLM server per GPU (on CPU: --num_servers), and return once all of them answer, or say why one does not.

    bash generation/register_server.sh MODEL [options] [-- options of vLLM]
    bash generation/register_server.sh --status | --stop

A second call with the same model and options finds the servers running. Logs and pid files are in .servers/HOST/, or
$BATON_SERVERS.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from baton import program
from baton.errors import InputError
from baton.launch import gpus
from baton.launch.words import new_parser, parse_known, positive
from baton.servers import processes as servers
from baton.sources import check_hub, check_model_path

log = logging.getLogger("baton")

LAST_PORT = 65535


def main() -> None:
    arguments, vllm_options = parse(sys.argv[1:])
    if arguments.status:
        print("\n".join(map(servers.describe, servers.known())) or "no servers")
    elif arguments.stop:
        stopped = servers.known()
        servers.stop(stopped)
        print("stopped:", *([server.port for server in stopped] or ["none"]))
    else:
        start(arguments, vllm_options)


def start(arguments: argparse.Namespace, vllm_options: list[str]) -> None:
    """Start the servers that do not run yet, and wait for all. Raises InputError or UnitFailed."""
    model = check_model(arguments.model)
    size, visible = arguments.tensor_parallel_size, gpus.visible()
    count = arguments.num_servers or max(len(visible) // size, 1)
    if visible and count * size > len(visible):
        raise InputError(f"{count} servers of {size} GPUs each, but there are {len(visible)} GPUs")
    if not visible and size > 1:
        raise InputError(f"--tensor_parallel_size {size}, but there is no GPU")
    ports = range(arguments.port, arguments.port + count)
    if ports[-1] > LAST_PORT:
        raise InputError(f"--port {arguments.port}: {count} servers would need port {ports[-1]}; the last one is {LAST_PORT}")

    names = ("tensor_parallel_size", "max_num_seqs", "gpu_memory_utilization", "max_model_len", "dtype")
    settings = {name: getattr(arguments, name) for name in names}
    gpus_each = size if visible else 0
    options, variables = servers.engine_options(settings, gpus_each, count)
    if arguments.api_key is not None:
        variables["VLLM_API_KEY"] = arguments.api_key

    check_hub(model)
    places = [servers.Place(arguments.host, port) for port in ports]
    started = servers.start_missing(places, model, [*options, *vllm_options], gpus_each, variables)
    if started:
        log.info("%s: servers to start: %d; it may take minutes; logs: %s/PORT.log", model, len(started), servers.folder())
    for server in servers.wait_until_ready(ports, started, arguments.timeout):
        print(servers.describe(server), flush=True)


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this program, and those for vLLM, which stand after `--`. Raises InputError."""
    words, vllm_options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = new_parser("register_server.sh", __doc__, "%(prog)s MODEL [options] [-- options of vLLM]")
    parser.add_argument("--status", action="store_true", help="show the servers that were started here")
    parser.add_argument("--stop", action="store_true", help="end them")
    parser.add_argument("--num_servers", type=positive, metavar="N", help="[one per visible GPU or group of GPUs; 1 on CPU]")
    parser.add_argument("--port", type=positive, default=8000, help="of the first server; the next ones follow [%(default)s]")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s: this machine alone]")
    parser.add_argument("--api_key", help="what clients must send; $VLLM_API_KEY does the same, and no process list shows it")
    parser.add_argument("--timeout", type=positive, default=1800, help="seconds to wait until all are ready [%(default)s]")
    parser.add_argument("--tensor_parallel_size", type=positive, default=1, help="GPUs that share a model [%(default)s]")
    parser.add_argument("--max_num_seqs", type=positive, default=200, help="responses sampled at once [%(default)s]")
    parser.add_argument("--gpu_memory_utilization", metavar="X", default="0.9", help="share of a GPU's memory [%(default)s]")
    parser.add_argument("--max_model_len", metavar="N", help="tokens of prompt and response [the model's context]")
    parser.add_argument("--dtype", help="of weights and arithmetic [the model's]")
    arguments, rest = parse_known(parser, words)
    if unknown := [word for word in rest if word.startswith("-")]:
        raise InputError(f"unknown option '{unknown[0]}'; --help lists them, and options for vLLM stand after --")
    if len(rest) > 1:
        raise InputError(f"one model at a time, got '{rest[0]}' and '{rest[1]}'")
    if not (rest or arguments.status or arguments.stop):
        parser.print_usage(sys.stderr)
        raise InputError("which model?")
    arguments.model = rest[0] if rest else None
    return arguments, vllm_options


def check_model(model: str) -> str:
    """A hub name as it is, a folder as a full path. Raises InputError for a folder without a model, or a name of neither."""
    check_model_path(model)
    if not Path(model).exists():
        return model
    if not Path(model, "config.json").is_file():
        raise InputError(f"{model}: no config.json in this folder; a server needs a whole model")
    return os.path.realpath(model)


if __name__ == "__main__":
    program.run(main)
