"""Scores of an LLM judge over an OpenAI-compatible API: from 1 to 10, by a rubric."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from annotate_data.parallel import in_parallel
from annotate_data.work import Score, Task
from baton.servers.addresses import Refused, Transient
from baton.servers.client import Client
from baton.servers.rewards import as_text, without_rewards

NO_NUMBER = "the judge gave no score from 1 to 10"
MAX_TOKENS = 1024  # of the judge's answer


class Judge:
    """A judge model behind one or several base URLs (`…/v1`). Call it with tasks: it yields each missing response's score.

    The first try is greedy; after an answer without a score the next one is at temperature 0.7, with another seed. What has
    none after `tries` tries has no score.
    """

    def __init__(self, urls: list[str], model: str, rubric: str, api_key: str | None, workers: int, seconds: float, tries: int):
        urls = [url.rstrip("/") + "/chat/completions" for url in urls]
        self.client = Client(urls, api_key, seconds, tries)
        self.model, self.rubric, self.workers, self.tries = model, rubric, workers, tries

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        return in_parallel(self.score, ((task, index) for task in tasks for index in task.missing), self.workers)

    def score(self, missing: tuple[Task, int]) -> Score:
        """The score of one response, given as a task and the response's index."""
        task, index = missing
        question = f"{self.rubric}\n[Conversation]\n{as_text(task.prompt)}\n\n[Answer]\n{task.responses[index]}\n"
        for attempt in range(self.tries):
            body = {
                "model": self.model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0.7 if attempt else 0.0,
                "seed": attempt,
                "max_tokens": MAX_TOKENS,
            }
            try:
                text = self.client.ask(body, _content, f"{task.where}: prompt {task.record['id']}, response {index + 1}")
            except (Refused, Transient) as error:
                _, _, *why = without_rewards(error)
                return Score(task, index, None, *why)
            if (value := parse_score(text)) is not None:
                return Score(task, index, value)
        return Score(task, index, None, NO_NUMBER)


def parse_score(text: str) -> float | None:
    """The last `Score: N` of an answer, or an answer that is just a number, if it is from 1 to 10."""
    found = re.findall(r"score\W{0,8}?(-?\d+(?:\.\d+)?)", text, flags=re.IGNORECASE) or re.findall(
        r"^\s*(\d+(?:\.\d+)?)\s*(?:/\s*10)?\s*$", text
    )
    value = float(found[-1]) if found else None
    return value if value is not None and 1 <= value <= 10 else None


def _content(answer: Any) -> str:
    content = answer["choices"][0]["message"]["content"] or ""
    if not isinstance(content, str):
        raise TypeError("`content` is no text")
    return content
