"""Serve scorers over HTTP, in the shape of OpenRLHF's `remote_rm_url`: a reward model, a rule, or several with weights.

    python annotate_data/serve_rm.py --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 --port 5000
    python annotate_data/serve_rm.py --scorer bt:MODEL maths=function:docs/examples/gsm8k_reward.py:gsm8k_reward --weights 1 0.2
    python annotate_data/get_rewards.py --scorer http:http://127.0.0.1:5000/get_reward …

Kinds of scorers: bt:MODEL, vllm:MODEL, pair:MODEL, process:MODEL, custom:MODEL, function:FILE.py:NAME, http:URL[,URL…],
judge:URL[,URL…]; a name may stand before: NAME=KIND:TARGET.

POST /get_reward takes one prompt's samples: {"messages": [conversation, response included]}, which the model's own chat
template writes, or {"query": [text]}, read as it is, its beginning in "prompts"; "labels" and "records" are for functions. It
answers {"rewards": [weighted sum], "rewards_by": {scorer: [number]}}; 422 where a response gets no score for good, 408 where
it gets none now (a call took too long), 503 where a service that a scorer asks is away. GET /health answers once all scorers
are loaded. Requests that arrive at the same time are scored in common batches.
"""

import itertools
import logging
import os
import secrets
from typing import Annotated, Any

from pydantic import SecretStr

from annotate_data import scorers
from annotate_data.scorer_arguments import ScorerArguments, weights_of
from baton.arguments import option, parse
from baton.errors import FailuresListed, InputError
from baton.program import run
from baton.scorers import KINDS_ON_GPU
from baton.sources import check_hub

log = logging.getLogger("baton")

READ_TEXTS = ("bt", "vllm", "custom")  # kinds that can read a text without knowing where its prompt ends


class Arguments(ScorerArguments):
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network")
    port: int = option(5000, "port to listen on", ge=1, le=65535)
    api_key: SecretStr | None = option(
        None, "key that requests must carry as `Authorization: Bearer KEY`; $REWARD_API_KEY does the same, and no process list "
        "shows it"
    )  # fmt: skip
    scorer_api_key: SecretStr | None = option(None, "key for the services of http and judge (default: $OPENAI_API_KEY)")

    def key(self) -> str | None:
        """The key of the services that scorers ask, from the arguments or the environment."""
        return self.scorer_api_key.get_secret_value() if self.scorer_api_key else os.environ.get("OPENAI_API_KEY")

    def own_key(self) -> str | None:
        """The key that requests must carry."""
        return self.api_key.get_secret_value() if self.api_key else os.environ.get("REWARD_API_KEY")


def main() -> None:
    arguments = parse(Arguments, __doc__)
    wanted = arguments.wanted()
    weights = weights_of(wanted, arguments.weights)
    for scorer in wanted:
        scorers.check(scorer, arguments)
    address = f"http://{arguments.host}:{arguments.port}/get_reward"
    if arguments.check:
        log.info("would serve %s at %s", ", ".join(weights), address)
        return
    for scorer in wanted:
        if scorer.kind in KINDS_ON_GPU:
            check_hub(scorer.target)

    import uvicorn

    from annotate_data.reward_service import started

    loaded = {scorer.name: (scorer.kind, scorers.maker(scorer, arguments)()) for scorer in wanted}
    submits = started(loaded)
    log.info("serves %s at %s", ", ".join(weights), address)
    app = application(submits, weights, {scorer.kind for scorer in wanted}, arguments.own_key())
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


def application(submits: dict[str, Any], weights: dict[str, float], kinds: set[str], key: str | None):
    """The FastAPI application around started scorers, see `reward_service.started`."""
    import asyncio

    from fastapi import Body, FastAPI, HTTPException, Request

    from annotate_data.reward_requests import NoReward, answer_of, tasks_of

    app = FastAPI(title="Rewards")
    positions = itertools.count()
    from_prompts, pairwise = not kinds <= set(READ_TEXTS), "pair" in kinds

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/get_reward")
    async def get_reward(request: Request, body: Annotated[dict, Body()]) -> dict[str, Any]:
        if not carries_key(request.headers.get("authorization", ""), key):
            raise HTTPException(401, "wrong or missing API key")
        try:
            if "process" in kinds and body.get("messages") is None:
                raise InputError("`query`: a process reward model reads what its own chat template writes: give `messages`")
            tasks = tasks_of(body, positions, from_prompts, pairwise)
            futures = {name: submit(tasks) for name, submit in submits.items()}
            await asyncio.gather(*(asyncio.wrap_future(future) for given in futures.values() for future in given))
            scores = {name: [score for future in given for score in future.result()] for name, given in futures.items()}
            return answer_of(scores, weights)
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except FailuresListed as error:  # a service that a scorer asks is away
            raise HTTPException(503, str(error)) from None
        except NoReward as error:
            raise HTTPException(error.status, str(error)) from None

    return app


def carries_key(header: str, key: str | None) -> bool:
    """Whether an Authorization header carries the key, if there is one; in the same time wherever the two differ."""
    return key is None or secrets.compare_digest(header.removeprefix("Bearer ").encode(), key.encode())


if __name__ == "__main__":
    run(main)
