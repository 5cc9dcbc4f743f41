"""What a reward service is asked and what it answers: from a request's body to tasks, from their scores to the answer.

The body is one prompt's samples, or those of several prompts: see baton/servers/rewards.py.
"""

import logging
import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from annotate_data.scorer_arguments import weighted_sum
from annotate_data.work import Score, Task
from baton.errors import InputError
from baton.records import Messages, as_messages

log = logging.getLogger("baton")

NEXT_TO_EACH_OTHER = "a pairwise scorer needs at least 2 responses to a prompt, next to each other in one request"

MOST_NOTES = 1000  # that the log gets

_noted: set[str] = set()  # the notes that the log has


class Sample(NamedTuple):
    """One response of a request."""

    prompt: Messages
    response: str
    text: str | None  # both, where a client has applied a template itself


class NoReward(Exception):
    """A response has no score; `status` is the HTTP status that says whether another try may give one."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def tasks_of(body: dict[str, Any], positions: Iterator[int], from_prompts: bool, pairwise: bool) -> list[Task]:
    """A request's samples as tasks, in order: neighbours with the same prompt, label and record are one task.

    `positions` gives each task its number; `from_prompts`: some scorer must know what the prompt is; `pairwise`: some scorer
    compares a prompt's responses. Raises InputError, naming the field, for a bad request.
    """
    samples = _conversations(body) if body.get("messages") is not None else _texts(body, from_prompts)
    labels = _column(body, "labels", len(samples)) or [None] * len(samples)
    records = _column(body, "records", len(samples)) or [{}] * len(samples)
    if not all(isinstance(record, dict) for record in records):
        raise InputError("`records` must hold objects")
    tasks = []
    for (prompt, label, record), group in groupby(
        range(len(samples)), key=lambda i: (samples[i].prompt, labels[i], records[i])
    ):
        numbers = list(group)
        responses = [samples[i].response for i in numbers]
        where = f"sample {numbers[0] + 1}"
        labelled = {"id": where} if label is None else {"id": where, "label": label}
        whole = {**labelled, **record, "prompt": prompt, "responses": responses}
        texts = [samples[i].text for i in numbers] if samples[numbers[0]].text is not None else None
        tasks.append(Task(next(positions), where, whole, prompt, responses, list(range(len(numbers))), texts))
    if pairwise and any(len(task.responses) < 2 for task in tasks):
        raise InputError(NEXT_TO_EACH_OTHER)
    return tasks


def answer_of(scores: dict[str, list[Score]], weights: dict[str, float]) -> dict[str, Any]:
    """The answer to a request, from the scores of its samples by each scorer.

    Raises NoReward where a sample has none: 422 if a scorer refuses one for good, else 408, which says nothing of the service.
    """
    failed = [(name, score) for name, given in scores.items() for score in given if not _is_score(score)]
    for name, score in sorted(failed, key=lambda pair: pair[1].again):  # what another try cannot mend comes first
        reason = score.note if score.value is None else f"gave {score.value}, which is no score"
        _note(f"{name}: {reason}" + (f": {score.detail}" if score.detail else ""))
        raise NoReward(f"{name}: response {score.index + 1} of {score.task.where}: {reason}", 408 if score.again else 422)
    for name, given in scores.items():
        for note in {score.note for score in given if score.note}:
            _note(f"{name}: responses {note}")
    by = {name: [score.value for score in given] for name, given in scores.items()}
    return {"rewards": weighted_sum(by, weights), "rewards_by": by}


def _conversations(body: dict[str, Any]) -> list[Sample]:
    """The samples of a request with `messages`."""
    samples = []
    for i, value in enumerate(_list(body, "messages")):
        messages = as_messages(value, f"messages[{i}]", "messages")
        if messages[-1]["role"] != "assistant":
            raise InputError(f"messages[{i}]: the last message must be the assistant's, got `{messages[-1]['role']}`")
        samples.append(Sample(messages[:-1], messages[-1]["content"], None))
    return samples


def _texts(body: dict[str, Any], from_prompts: bool) -> list[Sample]:
    """The samples of a request with `query`: texts that are read as they are, `prompts` the beginning of each."""
    texts = _list(body, "query")
    prompts = _column(body, "prompts", len(texts))
    if from_prompts and not prompts:
        raise InputError("`query` without `prompts`: only reward models can read it; give `messages`")
    prompts = prompts or [""] * len(texts)
    if not all(isinstance(text, str) and text for text in texts) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("`query` must be a list of texts that are not empty, and so must `prompts`")
    for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if not text.startswith(prompt):
            raise InputError(f"query[{i}]: does not begin with prompts[{i}]; give `messages`")
    return [
        Sample([{"role": "user", "content": prompt}], text[len(prompt) :], text)
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def _list(body: dict[str, Any], field: str) -> list:
    values = body.get(field)
    if not isinstance(values, list) or not values:
        raise InputError(f"`{field}` must be a list that is not empty; give `messages` or `query`")
    return values


def _column(body: dict[str, Any], field: str, count: int) -> list | None:
    """One value for each sample; None where there are none. A single record stands for all."""
    values = body.get(field)
    if values is None:
        return None
    if isinstance(values, list) and field == "records" and len(values) == 1:
        return values * count
    if not isinstance(values, list) or len(values) != count:
        raise InputError(f"`{field}` must be a list with one entry for each of the {count} samples")
    return values


def _is_score(score: Score) -> bool:
    return score.value is not None and math.isfinite(score.value)


def _note(text: str) -> None:
    """Log a note the first time."""
    if text not in _noted and len(_noted) < MOST_NOTES:
        _noted.add(text)
        log.warning("%s", text)
