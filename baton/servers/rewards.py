"""Rewards of a remote service, in the shape of OpenRLHF's `remote_rm_url`; annotate_data/serve_rm.py is one.

    request    {"query": [text], "prompts": [text], "labels": [any], "messages": [conversation], "records": [object]}
    answer     {"rewards": [number], "rewards_by": {scorer: [number]}}

A request is one prompt with its responses. `query` is prompt and response as one text, `labels` the record's `label`. Other
services may ignore the additions: `messages` is the conversation, response included, so that the service can apply its own
chat template; `records` is what else the record holds, once for all responses. `rewards_by` may be missing or null.
"""

from typing import Any, NamedTuple

from baton.jsonl import Record
from baton.records import PROMPT_KEYS, Messages, check_finite, prompt_of
from baton.servers.addresses import Refused, Transient
from baton.servers.client import Client

# What of a record is not sent beside the texts: it is there already, or long, and no scorer of texts reads it.
NOT_SENT = (*PROMPT_KEYS, "prompt_token_ids", "responses", "response_token_ids", "response_logps", "weight_versions")


class Scored(NamedTuple):
    """What a service says of one record's responses: their rewards, or why there are none."""

    rewards: list[float] | None
    by: dict[str, list[float]]  # of each scorer, where the service tells them apart
    why: str = ""  # there are none
    again: bool = False  # there are none, but another try may give some
    detail: str = ""  # what the service said when it refused


class Rewards:
    """A reward service behind one or several URLs. Safe to call from several threads."""

    def __init__(self, urls: list[str], api_key: str | None = None, seconds: float = 60.0, tries: int = 5):
        """`seconds` is how long one request may take; `tries` how often it is sent, to the URLs in turn."""
        self.client = Client(urls, api_key, seconds, tries)

    def cancel(self) -> None:
        """From another thread: no request is sent any more; `score` raises FailuresListed."""
        self.client.cancel()

    def score(self, record: Record, name: str = "") -> Scored:
        """The rewards of the responses of one generated record, in one request; `name` stands for the record in errors.

        Raises InputError for a wrong key or address, or a reward that is not finite; FailuresListed when the service is away.
        """
        name = name or f"prompt {record.get('id', 'without id')}"
        body = request_body(record, name)
        count = len(record["responses"])

        def read(answer: Any) -> Scored:
            by = answer.get("rewards_by") or {}
            by = {str(scorer): _numbers(values, count, name) for scorer, values in by.items()}
            return Scored(_numbers(answer["rewards"], count, name), by)

        try:
            return self.client.ask(body, read, name)
        except (Refused, Transient) as error:
            return without_rewards(error)


def without_rewards(error: Refused | Transient) -> Scored:
    """No rewards: for good where the service refuses the request, else for now."""
    if isinstance(error, Transient):
        return Scored(None, {}, f"no answer: {error}", again=True)
    status, _, words = str(error).partition(": ")
    return Scored(None, {}, f"refused by the service, {status}", detail=words)


def request_body(record: Record, name: str) -> dict[str, list]:
    """The request about a record's responses. Raises InputError, naming `name`, for a record without a prompt."""
    messages, responses = prompt_of(record, name), record["responses"]
    prompt = as_text(messages)
    rest = {key: value for key, value in record.items() if key not in NOT_SENT}
    body = {
        "query": [prompt + response for response in responses],
        "prompts": [prompt] * len(responses),
        "labels": [record.get("label")] * len(responses),
        "messages": [[*messages, {"role": "assistant", "content": response}] for response in responses],
    }
    return {**body, "records": [rest]} if rest else body


def as_text(prompt: Messages) -> str:
    """A prompt as plain text: the one user turn as it is, a conversation with the role before each turn."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "".join(f"{message['role']}: {message['content']}\n\n" for message in prompt)


def _numbers(values: list, count: int, name: str) -> list[float]:
    """`values` as `count` finite numbers. Raises ValueError for another number of them, InputError for NaN and infinities."""
    numbers = [float(value) for value in values]
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} rewards for {count} responses")
    for number in numbers:
        check_finite(number, name, "rewards")
    return numbers
