"""The records that stages hand each other, and the checks that each field must pass.

prompt      id, prompt: list of {"role", "content"}
generated   + responses, response_token_ids, finish_reasons: K of each; response_logps: K lists
annotated   + rewards: K floats; rewards_by: {scorer: K floats}
pair        id, prompt, chosen, rejected, their token ids and finish reasons, chosen_reward, rejected_reward,
margin
labelled    id, prompt, completion, its token ids, finish reason and reward, label: true for desirable
demonstration  id, messages; for the last turn, where it was sampled, response_token_ids and finish_reason: of it alone
"""

import math
from array import array

import xxhash

from baton.errors import InputError
from baton.jsonl import Record, dump

Messages = list[dict[str, str]]

PROMPT_KEYS = ("prompt", "context_messages")

# How chat templates of wide use open a response.
OPENINGS = (
    "<|start_header_id|>assistant<|end_header_id|>",
    "<|im_start|>assistant",
    "<start_of_turn>model",
    "<|assistant|>",
    "[/INST]",
    "Correct Assistant:",
)


def as_messages(value: object, where: str, field: str) -> Messages:
    """A conversation as a list of {"role", "content"}; a plain string is one user turn.

    Raises InputError naming `where` and `field` for anything else, and for a text that a chat template has written.
    """
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where}: `{field}` is empty")
        if value.rstrip().endswith(OPENINGS):
            raise InputError(
                f"{where}: `{field}` is a text that a chat template has written already, which would be written into another "
                "turn; give the messages that it was made from"
            )
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `{field}` must be a string or a list of messages, got {_short(value)}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{where}: `{field}`: a message needs `role` and `content`, got {_short(message)}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where}: `{field}`: `content` must be a string, got {_short(message)}")
    return value


def prompt_of(record: Record, where: str, key: str | None = None) -> Messages:
    """The prompt of a record as messages, from `key`, or from the first known key that it has."""
    for name in (key,) if key else PROMPT_KEYS:
        if name in record:
            return as_messages(record[name], where, name)
    wanted = f"`{key}`" if key else " or ".join(f"`{name}`" for name in PROMPT_KEYS)
    found = ", ".join(f"`{name}`" for name in record) or "no keys"
    raise InputError(f"{where}: the record has no {wanted}, it has {found}; name the key of the prompt with --dataset_key")


def prompt_hash(messages: Messages) -> int:
    """A 64-bit hash of a conversation's roles and contents, the same in every run and on every machine."""
    return xxhash.xxh3_64_intdigest(dump([[m["role"], m["content"]] for m in messages]))


def prompt_id(hash_: int, ordinal: int) -> str:
    """The id of a prompt: its hash, and its ordinal where the same prompt has come before."""
    return f"{hash_:016x}" if ordinal == 0 else f"{hash_:016x}-{ordinal}"


def responses_of(record: Record, where: str) -> list[str]:
    """The K responses of a generated record.

    Raises InputError if they are missing, empty or not strings, or if what stands beside them is not K lists of token ids, K
    finish reasons, or K lists of a log-probability for each token id.
    """
    responses = record.get("responses")
    if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
        raise InputError(f"{where}: `responses` must be a list of at least one string, got {_short(responses)}")
    for name in ("response_token_ids", "finish_reasons", "response_logps"):
        values = record.get(name)
        if values is not None and (not isinstance(values, list) or len(values) != len(responses)):
            raise InputError(f"{where}: `{name}` must hold one entry for each of the {len(responses)} responses")
    for ids in record.get("response_token_ids") or ():
        check_token_ids(ids, where, "response_token_ids")
    if record.get("response_logps") is not None:
        _check_logps(record, where)
    return responses


def how_sampled(record: Record, index: int, token_ids: str, finish_reason: str) -> Record:
    """What a generated record knows of how response `index` was sampled: its token ids and finish reason, under these names."""
    columns = ((token_ids, "response_token_ids"), (finish_reason, "finish_reasons"))
    return {name: record[column][index] for name, column in columns if record.get(column)}


def rewards_of(record: Record, where: str) -> list[float]:
    """The K rewards of an annotated record, a finite number for each response. Raises InputError if not."""
    count, rewards = len(responses_of(record, where)), record.get("rewards")
    if not isinstance(rewards, list):
        raise InputError(f"{where}: `rewards` must be a list of numbers, got {_short(rewards)}; annotate the file first")
    if len(rewards) != count:
        raise InputError(f"{where}: {len(rewards)} `rewards` for {count} `responses`")
    for reward in rewards:
        check_finite(reward, where, "rewards")
    return rewards


def check_finite(value: object, where: str, field: str) -> None:
    """Raise InputError, naming `where` and `field`, unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"{where}: `{field}` holds {_short(value)}, which is not a finite number; correct it or leave the record out"
        )


def check_token_ids(value: object, where: str, field: str) -> None:
    """Raise InputError, naming `where` and `field`, unless `value` is a list of token ids: integers from 0 on."""
    try:
        if isinstance(value, list) and min(array("q", value), default=0) >= 0:
            return
    except (TypeError, OverflowError):
        pass
    raise InputError(f"{where}: `{field}` must be a list of token ids, integers from 0 on, or be absent; got {_short(value)}")


def _check_logps(record: Record, where: str) -> None:
    """Raise InputError unless each of `response_logps` holds a finite number for each of its response's token ids."""
    if record.get("response_token_ids") is None:
        raise InputError(f"{where}: `response_logps` belong to `response_token_ids`, which the record does not have")
    for number, (logps, ids) in enumerate(zip(record["response_logps"], record["response_token_ids"], strict=True), 1):
        if not isinstance(logps, list) or len(logps) != len(ids):
            raise InputError(
                f"{where}: `response_logps` of response {number} must be a list of {len(ids)} numbers, one for each of its "
                f"token ids; got {_short(logps)}"
            )
        try:
            array("d", logps)
            finite = all(map(math.isfinite, logps))
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            raise InputError(f"{where}: `response_logps` of response {number} must hold finite numbers, got {_short(logps)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
