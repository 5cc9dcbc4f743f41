"""Sample K responses to each prompt through running servers, over the OpenAI-compatible API.

    bash generation/register_server.sh MODEL                          one vLLM server per GPU
    python generation/gen_hf.py --ports 8000 8001 --tokenizer MODEL \\
        --dataset_name_or_path prompts.jsonl --output_dir data/gen_data.jsonl --K 8
    python generation/gen_hf.py --url https://host/v1 …               any other server

With --tokenizer, prompts are sent as token ids made with the policy's chat template; without it, as messages,
and the server applies its own. Token ids and finish reasons of the responses are kept where the server gives them.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from baton import program
from baton.arguments import option, parse
from baton.drops import Drops
from baton.errors import FailuresListed, InputError
from baton.models.templates import load_tokenizer
from baton.partial import PartialRecords
from baton.progress import Progress
from baton.prompts import PromptSet
from baton.servers import processes
from baton.servers.pool import PER_SERVER, Refused, Servers, Transient, base_url
from baton.sources import check_hub, check_hub_ahead, check_model_path
from baton.stage import Stage
from generation import sampling
from generation.api import Service, ask, check_logps
from generation.arguments import (
    GenerationArguments,
    check,
    check_prompts_ahead,
    prompt_inputs,
    read_prompts,
)

log = logging.getLogger("baton")

NAMED_FAILURES = 20
WORKERS = 128  # prompts in flight, where nobody says how many


class ClientArguments(GenerationArguments):
    """What sampling through any servers takes."""

    output_dir: str = option(..., "the output FILE, such as data/gen_data.jsonl", changes_result=False)
    max_workers: int | None = option(
        None, "prompts in flight at most, over all servers; if not given, 128, or of vLLM's servers as many as keep them busy",
        ge=1, changes_result=False,
    )  # fmt: skip
    timeout: float = option(1800, "seconds to wait for one prompt's responses", gt=0, changes_result=False)
    max_retries: int = option(8, "attempts at a prompt after the first", ge=0, changes_result=False)
    patience: float = option(300, "seconds to wait while no server answers", ge=0, changes_result=False)
    drop_failed: bool = option(
        False, "count prompts that a server refuses as drops; otherwise the next call tries them again", changes_result=False
    )


class Arguments(ClientArguments):
    ports: list[int] = option([], "ports of servers on this machine", changes_result=False)
    url: list[str] = option([], "addresses of servers, such as http://host:8000/v1", changes_result=False)
    tokenizer: str | None = option(None, "the policy, for its tokenizer and chat template", changes_result=False)
    model: str | None = option(None, "the model's name at the servers; the first that they serve if not given")
    api_key: SecretStr | None = option(None, "the servers' API key; $VLLM_API_KEY if not given", changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__ or "")
    urls = [f"http://127.0.0.1:{port}/v1" for port in arguments.ports] + list(map(base_url, arguments.url))
    if not urls:
        raise InputError("which servers? give --ports 8000 8001 … or --url http://host:8000/v1 …")
    if not all(0 < port < 65536 for port in arguments.ports):
        raise InputError(f"--ports {arguments.ports}: a port is a number from 1 to 65535")
    if arguments.chat_template and not arguments.tokenizer:
        raise InputError("--chat_template: without --tokenizer a server applies its own; give both, or start it with this one")
    processes.check_not_refused(arguments.ports)
    if not arguments.tokenizer and not arguments.model:
        log.warning("give --tokenizer or --model: without both, the answers of another model count as the same task")
    key = arguments.api_key.get_secret_value() if arguments.api_key else os.environ.get("VLLM_API_KEY")
    sample(arguments, Path(arguments.output_dir), arguments.tokenizer, nullcontext(urls), arguments.model, key)


def sample(
    arguments: ClientArguments,
    output: Path,
    policy: str | None,
    servers: AbstractContextManager[list[str]],
    model: str | None = None,
    key: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """The stage: responses of the servers, whose URLs the context gives, to all prompts.

    `policy` is the model whose tokenizer makes the prompts' token ids, by code of its own with `trust_remote_code`; None sends
    messages. The context is entered only where there is something to sample.
    """
    check(arguments)
    inputs = prompt_inputs(arguments)
    if policy:
        check_model_path(policy)
        inputs["tokenizer"] = policy
    stage = Stage.begin("generate through servers", arguments, output, inputs)
    if stage is None:
        if policy:
            check_hub_ahead(policy, output, weights=False)
        check_prompts_ahead(arguments, output)
        return
    prompts = read_prompts(arguments)
    partial, drops = PartialRecords(output, len(prompts)), Drops()
    tokens = sum(sampling.count_tokens(record) for _, record in partial.records())
    facts: dict[str, Any] = {}
    if partial.done < len(prompts):
        tokenizer = None
        if policy:
            check_hub(policy, weights=False)
            tokenizer = load_tokenizer(policy, arguments.chat_template, trust_remote_code=trust_remote_code)
            sampling.check_tokenizer(tokenizer, arguments, prompts, (0, 1))
        with servers as urls:
            pool = Servers(urls, key, arguments.timeout, arguments.max_retries, arguments.patience)
            facts = asyncio.run(generate(arguments, pool, model, tokenizer, prompts, partial, drops))
    tokens += facts.pop("tokens", 0)
    written = partial.assemble()
    stage.finish(records_in=len(prompts), records_out=written, drops=drops, prompts=len(prompts), tokens=tokens, **facts)


async def generate(
    arguments: ClientArguments,
    servers: Servers,
    model: str | None,
    tokenizer: Any,
    prompts: PromptSet,
    partial: PartialRecords,
    drops: Drops,
) -> dict[str, Any]:
    """Sample responses to the unfinished prompts, each on disk once it is finished; returns tokens and model.

    Raises FailuresListed, with everything else done, if servers refuse prompts, fail at them for good, or die.
    """
    try:
        service = await Service.find(servers, model)
        await check_logps(service, arguments)
        count = len(servers.servers)
        workers = arguments.max_workers or WORKERS
        if service.engine == "vllm" and not arguments.max_workers:
            workers = max(WORKERS, PER_SERVER // arguments.K * count)
        program.log_what_runs(servers=count, model=service.model, engine=service.engine, context=service.context)
        if tokenizer is None:
            tasks = messages_only(prompts, partial)
        else:
            tasks = sampling.unfinished(tokenizer, prompts, (0, 1), partial, drops, service.context)
        progress, start, tokens, failures = Progress(partial.count, "prompts", partial.done), time.monotonic(), 0, []

        async def worker() -> None:
            nonlocal tokens
            for task in tasks:
                name = f"{task.record['id']} ({task.where})"
                try:
                    record = sampling.generated(task.record, await ask(service, task, arguments))
                except (Refused, Transient) as error:
                    if arguments.drop_failed and isinstance(error, Refused):
                        drops.add("refused by the server", f"{name}: {error}")  # which often names numbers of tokens
                    else:
                        failures.append(f"{name}: {error}")
                    continue
                partial.append(task.position, record)
                tokens += sampling.count_tokens(record)
                progress.update(note=f"{tokens / (time.monotonic() - start):.0f} tokens/s")

        await run_all([asyncio.create_task(worker()) for _ in range(workers)])
        progress.close()
    finally:
        await servers.close()
    if failures:
        listed = "\n".join(failures[:NAMED_FAILURES])
        more = f"\n… and {len(failures) - NAMED_FAILURES} more" if len(failures) > NAMED_FAILURES else ""
        raise FailuresListed(
            f"{len(failures)} of {len(prompts)} prompts failed, the others are kept:\n{listed}{more}\nthe same command "
            "tries these again; with --drop_failed it leaves out what servers refuse"
        )
    return {"tokens": tokens, "model": service.model, "engine": service.engine}


async def run_all(workers: list[asyncio.Task]) -> None:
    """Wait for all workers; when one fails, stop the others and raise its error."""
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def messages_only(prompts: PromptSet, partial: PartialRecords) -> Iterator[sampling.Task]:
    """What is still to do, for a server that applies its own chat template."""
    for position, where, record, _ in prompts.shard(0, 1):
        if position not in partial:
            record.pop(sampling.TEMPLATE_HASH, None)  # of an earlier sampling; the server's template is not known here
            yield sampling.Task(position, where, record, [])


if __name__ == "__main__":
    program.run(main)
