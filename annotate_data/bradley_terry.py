"""Rewards of a Bradley-Terry model: a sequence classifier with one output, or some of several, read at the end."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

import torch

from annotate_data.conversations import token_ids
from annotate_data.work import Score, Task
from baton.models import loading
from baton.models.batching import batches, windows
from baton.models.scoring import Packing, packed_rewards, read_part, rewards
from baton.models.templates import load_tokenizer
from baton.models.trees import with_prompts
from baton.sources import weights_of_outputs


class BradleyTerry:
    """A reward model on one device. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = load_tokenizer(path, settings.chat_template)
        model = loading.load(AutoModelForSequenceClassification, path, settings.dtype)
        self.model = loading.place(model, device, settings.dtype)
        names = self.model.config.id2label
        self.weights = weights_of_outputs(path, [names[number] for number in sorted(names)], settings.heads)
        self.max_length = loading.longest_input(self.model, settings.max_length)
        self.tokens_per_batch = settings.tokens_per_batch or loading.TOKENS_PER_BATCH[device.type]
        self.tokens_per_row = settings.tokens_per_batch or loading.TOKENS_PER_ROW[device.type]
        self.least_filled = loading.LEAST_FILLED[device.type]
        self.packing = Packing(self.model, known=hasattr(self.model, "score"))

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            sequences, notes = token_ids(self.tokenizer, window, self.max_length)
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
        if self.packing.agreed(trees, self.tokens_per_row):
            yield from packed_rewards(self.model, trees, self.tokens_per_row, self.weights)
            return
        sequences = [ids for group in groups for ids in group]
        for batch in batches([len(ids) for ids in sequences], self.tokens_per_batch, self.least_filled):
            yield from zip(batch, rewards(self.model, [sequences[i] for i in batch], self.weights), strict=True)
