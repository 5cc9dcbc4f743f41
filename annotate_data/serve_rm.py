"""Serve a Bradley-Terry reward model over HTTP, in the shape of OpenRLHF's `remote_rm_url`.

    python annotate_data/serve_rm.py --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 --port 5000
    python annotate_data/get_rewards.py --scorer http:http://127.0.0.1:5000/get_reward …

POST /get_reward takes {"messages": [conversation, response included]}, which the model's own chat template writes, or
{"query": [text]}, read as it is; it answers {"rewards": [number]}. GET /health answers once the model is loaded. Requests that
arrive at the same time are scored in common batches.
"""

import queue
import secrets
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import SecretStr

from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.models import loading
from baton.models.templates import encode_all
from baton.program import log_what_runs, run
from baton.records import as_messages
from baton.sources import check_reward_model

# Requests to be scored: the token ids of each one's conversations, and where their rewards go.
Waiting = queue.SimpleQueue[tuple[list[list[int]], list[Future[float]]]]

WINDOW = 1024  # requests that are sorted into batches together


class Arguments(StageArguments):
    reward_name_or_path: str = option("sfairXC/FsfairX-LLaMA3-RM-v0.1", "Bradley-Terry reward model")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network")
    port: int = option(5000, "port to listen on", ge=1, le=65535)
    api_key: SecretStr | None = option(None, "key that requests must carry as `Authorization: Bearer KEY`")
    chat_template: Path | None = option(None, "Jinja file, for a reward model that has no chat template")
    max_length: int | None = option(None, "tokens of a conversation; longer ones lose their beginning", ge=8)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the model; auto: the checkpoint's, float32 on a CPU without bfloat16"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the model runs")
    tokens_per_batch: int | None = option(None, "tokens in a batch (default: 65536 on a GPU, 8192 on CPU)", ge=1)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    check_reward_model(arguments.reward_name_or_path)

    import uvicorn

    from annotate_data.bradley_terry import BradleyTerry
    from baton.models import devices

    device = devices.choose_device(arguments.device)
    settings = loading.Settings(arguments.dtype, arguments.max_length, arguments.tokens_per_batch, arguments.chat_template)
    scorer = BradleyTerry(arguments.reward_name_or_path, device, settings)
    log_what_runs(
        **devices.described(device), **loading.described(scorer.model), listens_on=f"{arguments.host}:{arguments.port}"
    )
    key = arguments.api_key.get_secret_value() if arguments.api_key else None
    uvicorn.run(application(scorer, key), host=arguments.host, port=arguments.port, log_level="warning")


def application(scorer, key: str | None):
    """The FastAPI application around a `BradleyTerry`."""
    import asyncio

    from fastapi import Body, FastAPI, HTTPException, Request

    app = FastAPI(title="Reward model")
    waiting: Waiting = queue.SimpleQueue()
    threading.Thread(target=score_forever, args=(scorer, waiting), daemon=True).start()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/get_reward")
    async def get_reward(request: Request, body: Annotated[dict, Body()]) -> dict[str, list[float]]:
        if not carries_key(request.headers.get("authorization", ""), key):
            raise HTTPException(401, "wrong or missing API key")
        try:
            sequences = await asyncio.to_thread(sequences_of, body, scorer.tokenizer)
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        futures: list[Future[float]] = [Future() for _ in sequences]
        waiting.put(([ids[-scorer.max_length :] for ids in sequences], futures))
        return {"rewards": await asyncio.gather(*map(asyncio.wrap_future, futures))}

    return app


def carries_key(header: str, key: str | None) -> bool:
    """Whether an Authorization header carries the key, if there is one; in the same time wherever the two differ."""
    return key is None or secrets.compare_digest(header.removeprefix("Bearer ").encode(), key.encode())


def sequences_of(body: dict, tokenizer: Any) -> list[list[int]]:
    """The token ids of a request's conversations or texts. Raises InputError, naming the field, for a bad request."""
    if "messages" in body:
        conversations = [as_messages(m, f"messages[{i}]", "messages") for i, m in enumerate(_list(body, "messages"))]
        return encode_all(tokenizer, conversations, [f"messages[{i}]" for i in range(len(conversations))])
    texts = _list(body, "query")
    if not all(isinstance(text, str) and text for text in texts):
        raise InputError("`query` must be a list of texts that are not empty")
    sequences = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not all(sequences):
        raise InputError("`query` holds a text without a token")
    return sequences


def score_forever(scorer, waiting: Waiting) -> None:
    """Score all requests that wait, up to WINDOW of them together; those that arrive meanwhile are scored next."""
    while True:
        taken = [waiting.get()]
        while len(taken) < WINDOW and not waiting.empty():
            taken.append(waiting.get())
        futures = [future for _, each in taken for future in each]
        try:
            for i, reward in scorer.stream([sequences for sequences, _ in taken]):
                futures[i].set_result(reward)
        except Exception as error:  # these requests fail, the service goes on
            for future in futures:
                if not future.done():
                    future.set_exception(error)


def _list(body: dict, field: str) -> list:
    values = body.get(field)
    if not isinstance(values, list) or not values:
        raise InputError(f"`{field}` must be a list that is not empty; give `messages` or `query`")
    return values


if __name__ == "__main__":
    run(main)
