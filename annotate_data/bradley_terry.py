"""Rewards of a Bradley-Terry model: a sequence classifier with one output, read at the end of the conversation."""

from collections.abc import Iterable, Iterator

import torch

from annotate_data.conversations import token_ids
from annotate_data.work import Score, Task
from baton.models import loading
from baton.models.batching import batches, windows
from baton.models.scoring import rewards
from baton.models.templates import load_tokenizer


class BradleyTerry:
    """A reward model on one device. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = load_tokenizer(path, settings.chat_template)
        self.model = loading.place(loading.load(AutoModelForSequenceClassification, path, settings.dtype), device)
        self.max_length = loading.longest_input(self.model, settings.max_length)
        self.tokens_per_batch = settings.tokens_per_batch or loading.TOKENS_PER_BATCH[device.type]
        self.least_filled = loading.LEAST_FILLED[device.type]

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            sequences, notes = token_ids(self.tokenizer, window, self.max_length)
            for i, reward in self.stream(sequences):
                yield Score(*window[i], reward, notes[i])

    def stream(self, sequences: list[list[int]]) -> Iterator[tuple[int, float]]:
        """Yield (index, reward) of each sequence of token ids, batch by batch, longest first."""
        lengths = [len(ids) for ids in sequences]
        for batch in batches(lengths, self.tokens_per_batch, self.least_filled):
            yield from zip(batch, rewards(self.model, [sequences[i] for i in batch]), strict=True)
