"""Sample K responses to every prompt through vLLM servers of its own, one per GPU (or one on the CPU), which end with it.

    python generation/run_servers.py --model_name_or_path MODEL --dataset_name_or_path PROMPTS \\
        --output_dir ./data/gen_data --K 4

writes <output_dir>.jsonl (--output_dir is the beginning of a file's name), as generation/gen_hf.py does with servers that are
there. The servers take free ports of this machine and log to <output_dir>.servers/. After any failure, run the same command
again: it goes on where it stopped.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from baton import program
from baton.arguments import option, parse
from baton.errors import FailuresListed, InputError
from baton.launch import chain, gpus
from baton.servers import own
from baton.sources import check_model_path
from generation.arguments import QUANTIZATION, TRUST_REMOTE_CODE, SpeculativeConfig, changed
from generation.gen_hf import ClientArguments, sample

Running = AbstractContextManager[list[str]]  # a context that gives the URLs of servers


class Arguments(ClientArguments):
    model_name_or_path: str = option(..., "the policy: a model's folder or hub name", changes_result=False)
    output_dir: str = option("./data/gen_data", "the output is <output_dir>.jsonl", changes_result=False)
    num_servers: int | None = option(None, "servers; one per GPU or group of GPUs, 1 on a CPU", ge=1, changes_result=False)
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model", ge=1, changes_result=False)
    max_model_len: int | None = option(None, "tokens of prompt and response; the model's context if not given", ge=2)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = option(None, "of weights and arithmetic")
    quantization: str | None = option(None, QUANTIZATION)
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE, changes_result=False)
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory", gt=0, le=1, changes_result=False)
    max_num_seqs: int | None = option(None, "responses that a server samples at once", ge=1, changes_result=False)
    max_num_batched_tokens: int | None = option(None, "tokens that a server computes in a step", ge=1, changes_result=False)
    speculative_config: SpeculativeConfig = option(None, "vLLM's speculative decoding, as JSON", changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__ or "")
    servers = servers_for(arguments)
    with ExitStack() as stack:
        running = started_once(own_servers(servers, Path(f"{arguments.output_dir}.servers")), stack)
        sample_set(arguments, running())
        # What follows in the same process is sampled now too, by the same servers; its own turn says what is wrong with it.
        for words in [] if arguments.check else chain.following(__file__):
            with suppress(InputError, FailuresListed):
                following = parse(Arguments, "", words)
                if servers_for(following) == servers:
                    sample_set(following, running())


def sample_set(arguments: Arguments, servers: Running) -> None:
    """The stage for one prompt set."""
    policy, trusts = arguments.model_name_or_path, arguments.trust_remote_code
    check_model_path(policy)
    sample(arguments, Path(f"{arguments.output_dir}.jsonl"), policy, servers, trust_remote_code=trusts)


@dataclass(frozen=True)
class Wanted:
    """The servers that sampling takes: of which model, how many, on how many GPUs each, with which of vLLM's settings."""

    model: str
    count: int
    gpus_each: int
    settings: dict[str, Any]
    seed: int = field(compare=False)  # a set with another one goes on with these servers' random numbers


def servers_for(arguments: Arguments) -> Wanted:
    """The servers for these arguments. Raises InputError where there are too few GPUs, or `output_dir` is no prefix."""
    if not Path(arguments.output_dir).name or arguments.output_dir.endswith("/"):
        raise InputError(f"--output_dir {arguments.output_dir}: give the beginning of file names, such as data/gen_data")
    size, visible = arguments.tensor_parallel_size, gpus.visible()
    count = arguments.num_servers or (len(visible) // size if visible else 1)
    if (size > 1 or visible) and not 0 < count * size <= len(visible):
        raise InputError(f"{max(count, 1)} servers of {size} GPUs each, but there are {len(visible)} GPUs")
    names = ("tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")
    names += ("max_model_len", "dtype", "quantization")
    settings = {name: getattr(arguments, name) for name in names}
    if arguments.trust_remote_code:
        settings["trust_remote_code"] = True
    if arguments.speculative_config:
        settings["speculative_config"] = json.dumps(arguments.speculative_config)
    if changed(arguments):
        settings["logprobs_mode"] = "processed_logprobs"  # after temperature, top-k, top-p and min-new-tokens
    return Wanted(arguments.model_name_or_path, count, size if visible else 0, settings, arguments.seed)


def started_once(servers: Running, stack: ExitStack) -> Callable[[], Running]:
    """Contexts that give the URLs of `servers`, which start where the first is entered and end with `stack`."""
    urls: list[str] = []

    @contextmanager
    def running() -> Iterator[list[str]]:
        if not urls:
            urls.extend(stack.enter_context(servers))
        yield urls

    return running


@contextmanager
def own_servers(wanted: Wanted, folder: Path) -> Iterator[list[str]]:
    """Context in which servers of the policy answer, whose URLs it gives; logs and state of them are in `folder`."""
    groups = gpus.groups(gpus.visible(), wanted.gpus_each)[: wanted.count] if wanted.gpus_each else [[]] * wanted.count
    policies = own.policy_servers(wanted.model, groups, wanted.settings, api_key="", seed=wanted.seed)
    with own.running(policies, folder) as servers:
        yield [f"{server.url}/v1" for server in servers]


if __name__ == "__main__":
    program.run(main)
