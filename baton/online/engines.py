"""What an online training samples and scores with: vLLM servers that take its weights, and a reward service.

Servers that the program owns start with it and end with it. One that dies is left aside until the next weights are sent; then
it starts anew, and answers once it has them: no response ever comes from weights that it started with.
"""

import logging
import os
import secrets
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import httpx
from torch import Tensor

from baton.errors import FailuresListed, InputError
from baton.launch import gpus
from baton.online.arguments import OnlineArguments
from baton.program import world_size
from baton.servers import own
from baton.servers.groups import own_address
from baton.servers.own import OwnServer
from baton.servers.rewards import Rewards
from baton.servers.rollouts import Rollouts
from baton.servers.weights import Transfer, TransferFailed

log = logging.getLogger("baton")

PATIENCE = 10.0  # seconds without a server of our own that answers, until those that died start anew
# Tries of a request to a reward service: one that others run may start anew, for which ten give it 45 seconds on average.
TRIES, TRIES_ELSEWHERE = 5, 10


@dataclass
class Engines:
    """`rollouts` and `rewards` to ask, and `take` to give weights to; `servers` are the policy's that the program owns.

    `reward_server` is that of the rewards, where the program owns it.
    """

    rollouts: Rollouts
    rewards: Rewards
    transfer: Transfer
    servers: Sequence[OwnServer]
    reward_server: OwnServer | None

    def take(self, weights: Iterable[tuple[str, Tensor]], version: int, last: bool) -> bool:
        """Send weights to all servers; False where one could not take them and has been started anew, to be sent them again.

        `weights` are taken to the end in any case. Raises FailuresListed where it is the `last` try, or not our server.
        """
        weights = iter(weights)
        self.restart_dead()
        try:
            self.transfer.send(weights, version)
            return True
        except TransferFailed as failure:
            for _ in weights:  # gathered by all processes together
                pass
            if last or not self.servers:
                raise FailuresListed(f"{failure}; what is finished is kept: run the same command again") from None
            log.warning("%s", failure)
            own.restart(*(server for server in self.servers if server.url in failure.urls))
            return False

    def restart_dead(self) -> bool:
        """Start those of our servers anew that have ended; whether there was one."""
        owned = [*self.servers, *([self.reward_server] if self.reward_server else [])]
        dead = [server for server in owned if not own.is_alive(server)]
        own.restart(*dead)
        return bool(dead)

    def sleep(self) -> None:
        """Have the servers leave the GPUs that they share with the trainer to it. Raises FailuresListed where one does not."""
        self._despite_deaths(self.transfer.sleep)

    def wake(self) -> None:
        """End `sleep`. Raises FailuresListed where a server goes on sleeping."""
        self._despite_deaths(self.transfer.wake)

    def _despite_deaths(self, tell: Callable[[], None]) -> None:
        """Tell all servers something. Those of ours that have died start anew with the next weights."""
        try:
            tell()
        except TransferFailed as failure:
            dead = {server.url for server in self.servers if not own.is_alive(server)}
            if set(failure.urls) - dead:
                raise FailuresListed(f"{failure}; what is finished is kept: run the same command again") from None


@contextmanager
def engines(arguments: OnlineArguments, context: int, folder: Path, device: str) -> Iterator[Engines]:
    """Context in which the servers run. `context`: tokens of prompt and response together. Logs of servers are in `folder`.

    Raises InputError where there are too few GPUs, or a server serves another model.
    """
    groups = server_gpus(arguments)
    shared = shares_gpus(arguments)
    if shared and arguments.staleness:
        raise InputError("`staleness: 1` needs GPUs for the servers alone: name them with `server_gpus`")
    wanted = []
    if not arguments.vllm_url:
        settings = {
            "tensor_parallel_size": arguments.tensor_parallel_size,
            "gpu_memory_utilization": arguments.gpu_memory_utilization,
            "max_num_seqs": 1 if arguments.reproducible else arguments.max_num_seqs,
            "enable_prefix_caching": False if arguments.reproducible else None,
            "enable_sleep_mode": True if shared else None,
            "enforce_eager": True if arguments.enforce_eager and groups[0] else None,  # on a CPU it is always so
            "max_model_len": context,
            "dtype": arguments.server_dtype,
            "logprobs_mode": "processed_logprobs",
        }
        wanted += own.policy_servers(arguments.model_name_or_path, groups, settings, weights=True, seed=arguments.seed)
    if not arguments.reward_url:
        words = ["--scorer", *arguments.scorer, *shlex.split(arguments.reward_args)]
        words += ["--weights", *map(str, arguments.weights)] if arguments.weights else []
        wanted.append(own.reward_server(words, reward_gpus(arguments), secrets.token_urlsafe(32)))
    with ExitStack() as stack:
        running = stack.enter_context(own.running(wanted, folder)) if wanted else []
        policies = running[: len(running) - (not arguments.reward_url)]
        urls = [server.url for server in policies] or [url.removesuffix("/v1") for url in arguments.vllm_url]
        key = policies[0].api_key if policies else _secret(arguments.vllm_api_key)
        asking = {"timeout": arguments.server_timeout, "patience": PATIENCE if policies else 60.0}
        at_once = 1 if arguments.reproducible else arguments.max_num_seqs
        asking |= {"per_server": 4 * at_once} if at_once else {}
        rollouts = stack.enter_context(Rollouts(urls, key, **asking))
        if rollouts.context < context:
            raise InputError(f"the servers take {rollouts.context} tokens, fewer than `max_prompt_length` + `max_new_tokens`")
        services = arguments.reward_url or [f"{running[-1].url}/get_reward"]
        key_of_rewards = _secret(arguments.reward_api_key) if arguments.reward_url else running[-1].api_key
        if arguments.reward_url:
            check_service(Rewards(services, key_of_rewards, arguments.reward_timeout, TRIES), services)
        tries = TRIES_ELSEWHERE if arguments.reward_url else TRIES
        rewards = Rewards(services, key_of_rewards, arguments.reward_timeout, tries)
        # NCCL connects no two processes on one GPU.
        how = {"device": device, "backend": "gloo" if shared else None, "timeout": arguments.sync_timeout}
        how["host"] = meeting_place(urls)
        how["bucket_bytes"] = int(arguments.sync_megabytes * 2**20)
        transfer = stack.enter_context(closing(Transfer(urls, key, **how)))
        reward_server = None if arguments.reward_url else running[-1]
        yield Engines(rollouts, rewards, transfer, policies, reward_server)


def shares_gpus(arguments: OnlineArguments) -> bool:
    """Whether servers of the program and the trainer share GPUs, and so take turns."""
    return bool(gpus.visible()) and not arguments.server_gpus and not arguments.vllm_url


def meeting_place(urls: Sequence[str]) -> str:
    """The address of this machine by which servers reach it to take weights; its loopback's where all of them run here."""
    found = [own_address(url.host, url.port or 80) for url in map(httpx.URL, urls)]
    return next((address for address in found if not ip_address(address).is_loopback), own.HERE)


def check_service(rewards: Rewards, urls: Sequence[str]) -> None:
    """Raise InputError where nobody answers at a reward service. What it says of this record does not count."""
    try:
        rewards.score({"id": "check", "prompt": "Hello", "responses": ["Hello.", "Good day."]}, "a first request")
    except FailuresListed as error:
        raise InputError(f"`reward_url` {', '.join(urls)}: no answer: {error}") from None


def server_gpus(arguments: OnlineArguments) -> list[list[str]]:
    """The GPUs of each vLLM server to start; empty lists on a CPU.

    Raises InputError where they do not suffice, or `server_gpus` names one that training has.
    """
    ids = named_gpus(arguments.server_gpus) or gpus.visible()
    count, size = arguments.num_servers, arguments.tensor_parallel_size
    of_training = gpus.visible()[: int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))]
    if arguments.server_gpus and (both := [gpu for gpu in ids if gpu in of_training]):
        raise InputError(
            f"`server_gpus`: training takes GPU {', '.join(both)} too: give it others (CUDA_VISIBLE_DEVICES, --num_processes), "
            "or leave `server_gpus` out, and servers and training take turns on the same ones"
        )
    if not ids:
        if size > 1:
            raise InputError(f"`tensor_parallel_size`: {size}, but there is no GPU")
        return [[]] * count
    if count * size > len(ids):
        raise InputError(f"`num_servers`: {count} servers of {size} GPUs each, but `server_gpus` has {len(ids)}")
    return gpus.groups(ids, size)[:count]


def reward_gpus(arguments: OnlineArguments) -> list[str]:
    """The GPUs of the reward server to start: by default the last that is visible and no policy server's alone."""
    left = [gpu for gpu in gpus.visible() if gpu not in named_gpus(arguments.server_gpus)]
    return named_gpus(arguments.reward_gpus) or left[-1:]


def named_gpus(text: str | None) -> list[str]:
    """The ids of GPUs in a setting such as `4,5,6,7`."""
    return [gpu.strip() for gpu in (text or "").split(",") if gpu.strip()]


def _secret(key) -> str | None:
    return key.get_secret_value() if key is not None else None
