"""Rewards of a Bradley-Terry model: a sequence classifier with one output, or some of several, read at the end."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

import torch

from annotate_data.conversations import token_ids
from annotate_data.loaded import classifier
from annotate_data.work import Score, Task
from baton.models import loading
from baton.models.batching import batches, windows
from baton.models.scoring import Packing, packed_rewards, read_part, rewards
from baton.models.trees import with_prompts
from baton.sources import check_reward_model


class BradleyTerry:
    """A reward model on one device. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        self.tokenizer, self.model, self.limits = classifier(path, device, settings)
        # Of a model of the hub, or of a stage that had not run yet, nothing was known before.
        self.weights = check_reward_model(path, settings.heads, several=True, config=self.model.config.to_dict())
        self.packing = Packing(self.model, known=hasattr(self.model, "score"))

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            sequences, notes = token_ids(self.tokenizer, window, self.limits.conversation)
            # Conversations that lost their beginning share none with the others of their record
            kinds = ((task.position, note) for (task, _), note in zip(window, notes, strict=True))
            groups = [[ids for _, ids in group] for _, group in groupby(zip(kinds, sequences, strict=True), itemgetter(0))]
            for i, reward in self.stream(groups):
                yield Score(*window[i], reward, notes[i])

    def stream(self, groups: list[list[list[int]]]) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each sequence of token ids, in any order; the index counts through all groups.

        What all sequences of a group begin with is computed once, where the model takes packed rows.
        """
        trees = [tree for group in groups for tree in with_prompts([read_part(self.model, ids) for ids in group])]
        if self.packing.agreed(trees, self.limits.row):
            yield from packed_rewards(self.model, trees, self.limits.row, self.weights)
            return
        sequences = [ids for group in groups for ids in group]
        for batch in batches([len(ids) for ids in sequences], self.limits.batch, self.limits.least_filled):
            yield from zip(batch, rewards(self.model, [sequences[i] for i in batch], self.weights), strict=True)
