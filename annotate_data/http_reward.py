"""Rewards of a remote service, in the shape of OpenRLHF's `remote_rm_url`.

    request    {"query": [text], "prompts": [text], "labels": [any], "messages": [conversation]}
    answer     {"rewards": [number]}

`query` is prompt and response as one text, `labels` the record's `label`. `messages`, an addition that other services may
ignore, is the conversation, response included, so that the service can apply its own chat template.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from annotate_data.conversations import with_response
from annotate_data.parallel import in_parallel
from annotate_data.work import Score, Task
from baton.records import Messages
from baton.servers.addresses import Refused, Transient
from baton.servers.client import Client


class HTTPReward:
    """A reward service behind one or several URLs. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, urls: list[str], api_key: str | None, workers: int, seconds: float, tries: int):
        self.client, self.workers = Client(urls, api_key, seconds, tries), workers

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for scores in in_parallel(self.score, tasks, self.workers):
            yield from scores

    def score(self, task: Task) -> list[Score]:
        """The scores of one record, in one request."""
        prompt = as_text(task.prompt)
        body = {
            "query": [prompt + task.responses[index] for index in task.missing],
            "prompts": [prompt] * len(task.missing),
            "labels": [task.record.get("label")] * len(task.missing),
            "messages": [with_response(task, index) for index in task.missing],
        }

        def rewards(answer: Any) -> list[float]:
            values = [float(reward) for reward in answer["rewards"]]
            if len(values) != len(task.missing):
                raise ValueError(f"{len(values)} rewards for {len(task.missing)} responses")
            return values

        try:
            values = self.client.ask(body, rewards, f"{task.where}: prompt {task.record['id']}")
        except (Refused, Transient) as error:
            return [without_score(task, index, error) for index in task.missing]
        return [Score(task, index, value) for index, value in zip(task.missing, values, strict=True)]


def without_score(task: Task, index: int, error: Refused | Transient) -> Score:
    """No score of a response: for good where the service refuses it, else for now."""
    if isinstance(error, Transient):
        return Score(task, index, None, f"no answer: {error}", again=True)
    status, _, words = str(error).partition(": ")
    return Score(task, index, None, f"refused by the service, {status}", detail=words)


def as_text(prompt: Messages) -> str:
    """A prompt as plain text: the one user turn as it is, a conversation with the role before each turn."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "".join(f"{message['role']}: {message['content']}\n\n" for message in prompt)
