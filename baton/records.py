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

from baton.conversations import Messages, as_messages, hh_turns, shared_beginning, short, without_answer
from baton.errors import InputError
from baton.jsonl import Record, dump
from baton.program import harmless

# Where a prompt stands: the first of these that a record has.
PROMPT_KEYS = ("prompt", "context_messages")
CONVERSATION_KEYS = ("messages", "conversations")
# Alpaca's: what to do, with what, and what was said before, pairs of the user's and the assistant's turn.
ALPACA_KEYS = ("instruction", "input", "system", "history")
DOLLY_KEYS = ("instruction", "context", "system", "history")  # with its own name of the input
# Two whole conversations, which begin with it.
SIDE_KEYS = ("chosen", "rejected")


def prompt_of(record: Record, where: str, key: str | None = None) -> Messages:
    """The prompt of a record as messages, from `key`, or from the first known key that it has.

    Of a whole conversation (`messages`, `conversations`), the assistant's turns at its end are left out. Raises InputError.
    """
    messages, keys = prompt_as_written(record, where, key)
    return without_answer(messages, where, keys[0]) if keys[0] in CONVERSATION_KEYS else messages


def prompt_as_written(record: Record, where: str, key: str | None = None) -> tuple[Messages, tuple[str, ...]]:
    """The prompt of a record as messages, with the answer that may stand at its end, and the keys that it was read from."""
    keys = prompt_keys(record, key)
    if keys in (ALPACA_KEYS, DOLLY_KEYS):
        return _alpaca_prompt(record, where, keys[1]), keys
    of_sides = keys[:2] == SIDE_KEYS
    messages = _prompt_of_sides(record, where) if of_sides else None
    if keys and not of_sides:
        messages = as_messages(record[keys[0]], where, keys[0])
    if messages:
        return with_system(messages, record), keys
    wanted = f"`{key}`" if key else " or ".join(f"`{name}`" for name in PROMPT_KEYS)
    raise InputError(
        f"{where}: the record has no {wanted}, it has {named(record)}; name the key of the prompt with --dataset_key"
    )


def prompt_keys(record: Record, key: str | None = None) -> tuple[str, ...]:
    """The keys that a record's prompt is read from, the first known ones that it has; empty if it has none."""
    for name in (key,) if key else (*PROMPT_KEYS, *CONVERSATION_KEYS):
        if record.get(name) is not None:
            return and_system(record, (name,))
    if key:
        return ()
    if record.get("instruction") is not None:
        return DOLLY_KEYS if record.get("input") is None and isinstance(record.get("context"), str) else ALPACA_KEYS
    if "chosen" not in record or "rejected" not in record:
        return ()
    # `context` is ColossalChat's
    return and_system(record, ("context",) if record.get("context") is not None else SIDE_KEYS)


def named(record: Record) -> str:
    """The keys of a record, for an error."""
    return ", ".join(f"`{harmless(name)}`" for name in record) or "no keys"


def and_system(record: Record, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of a prompt, and `system` where there is such a text beside it."""
    return (*keys, "system") if "system" not in keys and isinstance(record.get("system"), str) else keys


def with_system(messages: Messages, record: Record) -> Messages:
    """The turns after the record's `system`, where that is a text and the turns have none."""
    system = record.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _alpaca_prompt(record: Record, where: str, given: str) -> Messages:
    """Alpaca's prompt: the instruction, what is `given` on the next line; before them `system` and `history`."""
    texts = {name: record.get(name) or "" for name in ("instruction", given, "system")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{where}: `{name}` must be a text, got {short(text)}")
    request = "\n".join(text for text in (texts["instruction"], texts[given]) if text.strip())
    if not request:
        raise InputError(f"{where}: `instruction` is empty")
    before = []
    for turn in record.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f"{where}: `history` must hold pairs of texts, the user's and the assistant's; got {short(turn)}")
        before += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return with_system([*before, {"role": "user", "content": request}], record)


def _prompt_of_sides(record: Record, where: str) -> Messages | None:
    """The beginning that `chosen` and `rejected`, two whole conversations, have in common."""
    sides = []
    for name in ("chosen", "rejected"):
        value = record.get(name)
        turns = hh_turns(value) if isinstance(value, str) else value
        if not isinstance(turns, list) or len(turns) < 2:
            return None
        sides.append(as_messages(turns, where, name))
    return shared_beginning(*sides)


def with_prefix(messages: Messages, prefix: str | None, where: str) -> Messages:
    """A prompt with `prefix` before its last user turn; as it is without one. Raises InputError where no turn is the user's."""
    if not prefix:
        return messages
    turn = next((number for number in reversed(range(len(messages))) if messages[number]["role"] == "user"), None)
    if turn is None:
        raise InputError(f"{where}: the prompt has no user turn to write {prefix!r} into")
    prefixed = {**messages[turn], "content": prefix + messages[turn]["content"]}
    return [*messages[:turn], prefixed, *messages[turn + 1 :]]


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
        raise InputError(f"{where}: `responses` must be a list of at least one string, got {short(responses)}")
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
        raise InputError(f"{where}: `rewards` must be a list of numbers, got {short(rewards)}; annotate the file first")
    if len(rewards) != count:
        raise InputError(f"{where}: {len(rewards)} `rewards` for {count} `responses`")
    for reward in rewards:
        check_finite(reward, where, "rewards")
    return rewards


def check_finite(value: object, where: str, field: str) -> None:
    """Raise InputError, naming `where` and `field`, unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"{where}: `{field}` holds {short(value)}, which is not a finite number; correct it or leave the record out"
        )


def check_token_ids(value: object, where: str, field: str) -> None:
    """Raise InputError, naming `where` and `field`, unless `value` is a list of token ids: integers from 0 on."""
    try:
        if isinstance(value, list) and min(array("q", value), default=0) >= 0:
            return
    except (TypeError, OverflowError):
        pass
    raise InputError(f"{where}: `{field}` must be a list of token ids, integers from 0 on, or be absent; got {short(value)}")


def _check_logps(record: Record, where: str) -> None:
    """Raise InputError unless each of `response_logps` holds a finite number for each of its response's token ids."""
    if record.get("response_token_ids") is None:
        raise InputError(f"{where}: `response_logps` belong to `response_token_ids`, which the record does not have")
    for number, (logps, ids) in enumerate(zip(record["response_logps"], record["response_token_ids"], strict=True), 1):
        if not isinstance(logps, list) or len(logps) != len(ids):
            raise InputError(
                f"{where}: `response_logps` of response {number} must be a list of {len(ids)} numbers, one for each of its "
                f"token ids; got {short(logps)}"
            )
        try:
            array("d", logps)
            finite = all(map(math.isfinite, logps))
        except (TypeError, OverflowError):
            finite = False
        if not finite:
            raise InputError(f"{where}: `response_logps` of response {number} must hold finite numbers, got {short(logps)}")
