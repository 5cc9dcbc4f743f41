"""Rewards of a remote service, in the shape of OpenRLHF's `remote_rm_url`: see baton/servers/rewards.py."""

from collections.abc import Iterable, Iterator

from annotate_data.parallel import in_parallel
from annotate_data.work import Score, Task
from baton.servers.rewards import Rewards


class HTTPReward:
    """A reward service behind one or several URLs. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, urls: list[str], api_key: str | None, workers: int, seconds: float, tries: int):
        self.rewards, self.workers = Rewards(urls, api_key, seconds, tries), workers

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for scores in in_parallel(self.score, tasks, self.workers):
            yield from scores

    def score(self, task: Task) -> list[Score]:
        """The scores of one record, in one request."""
        record = {**task.record, "prompt": task.prompt, "responses": [task.responses[index] for index in task.missing]}
        scored = self.rewards.score(record, f"{task.where}: prompt {task.record['id']}")
        if scored.rewards is None:
            return [Score(task, index, None, scored.why, scored.again, scored.detail) for index in task.missing]
        return [Score(task, index, value) for index, value in zip(task.missing, scored.rewards, strict=True)]
