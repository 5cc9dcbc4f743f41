"""Rewards of a process reward model, which says of each step of a response how probably it is right."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch

from annotate_data.conversations import REWRITTEN, TRUNCATED, check_conversation
from annotate_data.loaded import classifier
from annotate_data.work import Score, Task
from baton.errors import InputError
from baton.models import loading
from baton.models.batching import batches, windows
from baton.models.scoring import Packing, packed_step_probabilities, step_probabilities
from baton.models.sequences import shared_tokens
from baton.models.templates import with_places
from baton.models.trees import cut_after
from baton.sources import check_process_model
from baton.steps import reward_of_steps, separator_of, steps_of

NO_STEP = "a response without a step"


class Steps(NamedTuple):
    """A response whose steps are scored: a conversation up to the last one, and the tokens that they end with.

    Where there are no such places, `note` says why it has no score.
    """

    task: Task
    index: int
    ids: list[int]
    places: list[int]
    note: str | None


class ProcessReward:
    """A process reward model on one device. Call it with tasks: it yields the score of each missing response.

    It is a sequence classifier with one output, the logit of "right", which is read at the last token of each step.
    """

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        self.tokenizer, self.model, self.limits = classifier(path, device, settings)
        check_process_model(path, self.model.config.to_dict())
        self.packing = Packing(self.model)
        self.how, self.separator = settings.step_reward, separator_of(settings.step_separator)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            read = [self.steps(task, index) for task, index in window]
            for response in read:
                if not response.places:
                    yield Score(response.task, response.index, None, response.note)
            read = [response for response in read if response.places]
            for number, probabilities in self.stream(read) if read else ():
                task, index, *_, note = read[number]
                yield Score(task, index, reward_of_steps(probabilities, self.how), note)

    def steps(self, task: Task, index: int) -> Steps:
        """The steps of a response; where the conversation is longer than `max_length`, those of its end.

        Raises InputError, naming the record, where the chat template refuses the conversation.
        """
        response = task.responses[index]
        ends = steps_of(response, self.separator)
        if not ends:
            return Steps(task, index, [], [], NO_STEP)
        try:
            ids, places = with_places(self.tokenizer, task.prompt, response, ends, task.where)
        except InputError:
            if not self.tokenizer.is_fast:
                raise
            check_conversation(self.tokenizer, task, index)
            return Steps(task, index, [], [], REWRITTEN)
        ids = ids[: places[-1] + 1]
        cut = max(0, len(ids) - self.limits.conversation)
        return Steps(task, index, ids[cut:], [place - cut for place in places if place >= cut], TRUNCATED if cut else None)

    def stream(self, read: list[Steps]) -> Iterator[tuple[int, list[float]]]:
        """Yield (number, probabilities of its steps) of each response, in any order."""
        sequences, places = [response.ids for response in read], [response.places for response in read]
        trees = []
        # Conversations that lost their beginning share none with the others of their record
        for _, group in groupby(read, lambda response: (response.task.position, response.note)):
            members = list(group)
            shared = min(shared_tokens([one.ids for one in members]), *(one.places[0] for one in members))
            trees += cut_after([one.ids for one in members], shared)
        if self.packing.agreed(trees, self.limits.row):
            yield from packed_step_probabilities(self.model, trees, places, self.limits.row)
            return
        for batch in batches([len(ids) for ids in sequences], self.limits.batch, self.limits.least_filled):
            found = step_probabilities(self.model, [sequences[i] for i in batch], [places[i] for i in batch])
            yield from zip(batch, found, strict=True)
