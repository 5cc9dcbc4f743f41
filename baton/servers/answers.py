"""How the answer of an OpenAI-compatible server to a request for several responses is read."""

from typing import Any

from baton.servers.addresses import Refused, Transient


def choices(answer: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The choices in an answer, in the order of their index.

    Raises Transient for an answer without choices, or with responses that a pause or the server's end has cut off; Refused for
    another number of choices than `count`.
    """
    found = answer.get("choices")
    if not isinstance(found, list) or not all(isinstance(choice, dict) for choice in found):
        raise Transient("an answer without `choices`")
    if len(found) != count:
        raise Refused(f"{len(found)} responses instead of {count}: the server may not support `n`")
    if any(choice.get("finish_reason") == "abort" for choice in found):
        raise Transient("responses were cut off by a pause or the end of the server")
    return sorted(found, key=lambda choice: choice.get("index", 0))


def sampled_logps(choice: dict[str, Any], token_ids: list[int] | None) -> list[float]:
    """The sampled tokens' log-probabilities, from a text completion or a chat. Raises Refused if there is not one for each."""
    found = choice.get("logprobs") or {}
    logps = found.get("token_logprobs") or [token["logprob"] for token in found.get("content") or ()]
    if token_ids is None or len(logps) != len(token_ids):
        raise Refused(f"{len(logps)} log-probabilities for {len(token_ids or ())} token ids")
    return logps
