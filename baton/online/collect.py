"""A step's rollouts: sampled by the servers, scored by the reward service, and on disk as soon as they are known.

`rollouts/step000017.jsonl` is the hand-over to the training, the audit and the resume point: records as `get_rewards.py` writes
them, with `response_logps` and `weight_versions`. A step whose file is there is not sampled again, and of an unfinished one
only what is missing.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton import jsonl
from baton.errors import FailuresListed
from baton.jsonl import Record
from baton.online.prompts import Prompts
from baton.partial import PartialRecords, part_files
from baton.sampling import seed_from
from baton.servers.rewards import Rewards
from baton.servers.rollouts import Rollouts, Sampled

log = logging.getLogger("baton")

POLL_SECONDS = 0.1
SCORED_AT_ONCE = 16  # requests to the reward service, of one prompt each
TAKEN = "prompts_taken"  # how many prompts of the endless order were taken up to the end of a record's step


@dataclass(frozen=True)
class HowToSample:
    """`n` samples of each of `prompts` prompts a step, with vLLM's `sampling` settings.

    Prompts whose samples all have one reward teach nothing: up to `most_drawn` prompts are drawn to replace them. Where none is
    found that does, a step has the first ones.
    """

    prompts: int
    n: int
    sampling: dict[str, Any]
    seed: int
    most_drawn: int = 0


class Collector:
    """Collects the rollouts of steps into `folder`; to be used by process 0 alone."""

    def __init__(self, folder: Path, prompts: Prompts, rollouts: Rollouts, rewards: Rewards, how: HowToSample):
        self.folder, self.prompts, self.how = folder, prompts, how
        self.rollouts, self.rewards = rollouts, rewards
        self.cancelled: Future[None] = Future()

    def cancel(self) -> None:
        """End the call of `collect` that runs, if one does, from another thread: it raises FailuresListed."""
        self.cancelled.set_result(None)
        self.rollouts.cancel()
        self.rewards.cancel()

    def collect(self, step: int, taken: int, version: int) -> dict[str, float]:
        """Put the rollouts of a step on disk, sampled from weights of this version; returns what it took.

        `taken` prompts of the endless order were taken before. Raises FailuresListed where no prompt has rewards.
        """
        path, begun, how = step_file(self.folder, step), time.monotonic(), self.how
        if path.exists():
            log.info("step %d: its rollouts are there", step)
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        most = max(how.most_drawn, how.prompts)
        kept: list[Record] = []
        partial = PartialRecords(path, most)
        known = {place: record for place, record in partial.records() if not record.get("try_again")}
        drawn = 0
        while len(kept) < how.prompts and drawn < most:
            wanted = range(drawn, min(drawn + how.prompts - len(kept), most))
            missing = [place for place in wanted if place not in known]
            asked = [self.prompts.at(taken + place) for place in missing]
            for place, record in self.annotated(asked, missing, step, version):
                partial.append(place, record)
                known[place] = record
            drawn = wanted.stop
            kept += [known[place] for place in wanted if self._teaches(known[place])]
        partial.close()
        if not kept:  # where all that was drawn teaches nothing, it does no harm either, and the next step may have more
            kept = [known[place] for place in range(drawn) if "rewards" in known[place]][: how.prompts]
        if not kept:
            raise FailuresListed(f"step {step}: of {drawn} prompts none can be trained on: {why_none(known.values())}")
        refused = [record for record in known.values() if "no_rewards" in record]
        if refused:
            log.warning("step %d: left out, %d of %d prompts: %s", step, len(refused), drawn, why_none(refused))
        tokens = sum(len(ids) for record in known.values() for ids in record.get("response_token_ids", ()))
        whole = path.with_suffix(".whole")  # what is written at first has not the name of the parts, which it would replace
        jsonl.write(whole, ({**record, TAKEN: taken + drawn} for record in kept))
        whole.replace(path)
        for part in part_files(path):
            part.unlink(missing_ok=True)
        seconds = time.monotonic() - begun
        counts = {"prompts_drawn": float(drawn), "prompts_left_out": float(drawn - len(kept))}
        return counts | {"sampling_seconds": seconds, "sampling_tokens_per_second": tokens / seconds}

    def annotated(
        self, records: Sequence[Record], places: Sequence[int], step: int, version: int
    ) -> Iterator[tuple[int, Record]]:
        """Yield (place, record) with samples and rewards, as they come; without `rewards` where the service refuses them."""
        # A prompt may come twice in a step, where there are fewer than it takes: its samples must not come twice.
        seeds = [seed_from(self.how.seed, step, place, record["id"]) for place, record in zip(places, records, strict=True)]
        pool = ThreadPoolExecutor(SCORED_AT_ONCE)
        scored: deque[tuple[int, Future[Record]]] = deque()
        ids = [record["prompt_token_ids"] for record in records]
        try:
            for index, sampled in self.rollouts.sample(ids, self.how.n, self.how.sampling, seeds, version):
                record = with_samples(records[index], sampled, version)
                scored.append((places[index], pool.submit(self._with_rewards, record)))
                while scored and scored[0][1].done():
                    place, future = scored.popleft()
                    yield place, future.result()
            while scored:
                place, future = scored.popleft()
                wait((future, self.cancelled), return_when=FIRST_COMPLETED)
                if not future.done():
                    raise FailuresListed("the rewards were cancelled")
                yield place, future.result()
        finally:  # what ends the step does not wait for rewards
            pool.shutdown(wait=False, cancel_futures=True)

    def _with_rewards(self, record: Record) -> Record:
        scored = self.rewards.score(record)
        if scored.rewards is None:
            return {**record, "no_rewards": f"{scored.why} {scored.detail}".strip(), "try_again": scored.again}
        return {**record, "rewards": scored.rewards} | ({"rewards_by": scored.by} if scored.by else {})

    def _teaches(self, record: Record) -> bool:
        if "rewards" not in record:
            return False
        return not self.how.most_drawn or len(set(record["rewards"])) > 1


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step{step:06}.jsonl"


class StepRecords:
    """A step's rollouts, read from disk whenever they are iterated over: all at once may take more memory than there is."""

    def __init__(self, path: Path):
        self.path = path

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in jsonl.read(self.path))


def rollouts_of(folder: Path, step: int) -> StepRecords:
    """The rollouts of a step, once they are there: the other processes wait for process 0."""
    path = step_file(folder, step)
    while not path.exists():
        time.sleep(POLL_SECONDS)
    return StepRecords(path)


def with_samples(record: Record, sampled: Sampled, version: int) -> Record:
    """A prompt's record with its samples, which weights of this version gave.

    Token ids and log-probabilities are arrays, an eighth of what Python's numbers take while a step is sampled. The latter are
    float32, as the servers computed them, and on disk have no digits beyond that.
    """
    return {
        **record,
        "responses": sampled.texts,
        "response_token_ids": [np.array(ids, dtype=np.int32) for ids in sampled.token_ids],
        "finish_reasons": sampled.finish_reasons,
        "response_logps": [np.array(logps, dtype=np.float32) for logps in sampled.logps],
        "weight_versions": [version] * len(sampled.texts),
    }


def why_none(records: Any) -> str:
    """What to say of records of which none can be trained on."""
    return next(f"{record['no_rewards']} (prompt {record['id']})" for record in records if "no_rewards" in record)
