"""From responses with rewards, or with labelled steps, to the token ids that a reward model reads, and where it is read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.labels import checked_records
from baton.models.sequences import shared_tokens, without_padding
from baton.models.templates import conversation_token_ids, with_places
from baton.preferences import ANSWER_KEYS
from baton.records import SIDE_KEYS, check_finite, prompt_of, rewards_of
from baton.scored import annotated_records, rewards_by_name

LONGER = "responses longer than max_length, left out of records that stay"
DIVIDED = (
    "steps hold the separator themselves: when a response is scored, it is read there too, where nothing was learnt; choose "
    "another step_separator"
)


def scored_records(
    records: Iterable[tuple[str, Record]], score: str | None = None, heads: Sequence[str] | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield ("where", record) with `prompt` as messages, K `responses` and `scores`: K lists of a number for each head.

    Records are annotated or labelled ones, or scored responses of a data set, `score` the key of scores that have an unusual
    name. With `heads` the numbers are those of `rewards_by`, or the columns with these names. Raises InputError.
    """
    if heads:
        for where, record, by in rewards_by_name(records, heads):
            scores = [list(values) for values in zip(*by.values(), strict=True)]
            yield where, {"prompt": prompt_of(record, where), "responses": record["responses"], "scores": scores}
        return
    for where, record in annotated_records(records, score):
        yield where, _scored(record, where)


def _scored(record: Record, where: str) -> Record:
    if "responses" in record:
        scores = [[reward] for reward in rewards_of(record, where)]
        return {"prompt": prompt_of(record, where), "responses": record["responses"], "scores": scores}
    if not record.keys().isdisjoint((*SIDE_KEYS, *ANSWER_KEYS)):
        raise InputError(
            f"{where}: the record is a pair; loss_type regression learns from `responses` and `rewards`, or from "
            "`completion` and `label`"
        )
    (example,) = checked_records(record, where)
    reward = example.get("completion_reward", float(example["label"]))
    check_finite(reward, where, "completion_reward")
    return {"prompt": example["prompt"], "responses": [example["completion"]], "scores": [[reward]]}


def rows_of_scores(
    tokenizer: Any, max_length: int, pad: int, records: Iterable[tuple[str, Record]], drops: Drops, counted: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row (`row_of`) for each of the `scored_records` with a response that fits; `drops` gets the others.

    A response is read at its last token that is not `pad`, where transformers reads it. `counted` gets those that do not fit.
    """
    for where, record in records:
        sequences, targets = [], []
        for response, scores in zip(record["responses"], record["scores"], strict=True):
            ids = conversation_token_ids(tokenizer, [*record["prompt"], {"role": "assistant", "content": response}], where)
            if len(ids) <= max_length:
                sequences.append(without_padding(ids, pad))
                targets += scores
        if not sequences:
            drops.add(f"longer than max_length {max_length} tokens", where)
            continue
        if longer := len(record["responses"]) - len(sequences):
            counted[LONGER] += longer
        yield row_of(sequences, [[len(ids) - 1] for ids in sequences], targets)


def rows_of_steps(
    tokenizer: Any, max_length: int, separator: str, records: Iterable[tuple[str, Record]], drops: Drops, counted: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row (`row_of`) for each of the `steps.stepwise_records` that fits; `drops` gets the others.

    The steps with `separator` between them are the response; the label of each is learnt at its last token.
    """
    for where, record in records:
        ends, length = [], 0
        for step in record["completions"]:
            ends.append(length + len(step))
            length = ends[-1] + len(separator)
        response = separator.join(record["completions"])
        ids, places = with_places(tokenizer, record["prompt"], response, ends, where)
        if len(ids) > max_length:
            drops.add(f"longer than max_length {max_length} tokens", where)
        else:
            if divided := sum(separator in step for step in record["completions"]):
                counted[DIVIDED] += divided
            yield row_of([ids[: places[-1] + 1]], [places], [float(label) for label in record["labels"]])


def row_of(sequences: list[list[int]], places: list[list[int]], targets: list[float]) -> dict[str, Any]:
    """A row: token ids of K conversations of one prompt, where each is read, and what should be read there.

    `targets` are flat, those of a place one after another. `shared` tokens begin all conversations, and none is read there.
    """
    shared = min(shared_tokens(sequences), *(of_one[0] for of_one in places))
    lengths, reads = [len(ids) for ids in sequences], sum(map(len, places))
    return {
        "sequences": sequences, "places": places, "targets": targets, "shared": shared, "lengths": lengths, "reads": reads,
    }  # fmt: skip
