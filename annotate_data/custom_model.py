"""Rewards of a model that brings its own code, such as ArmoRM's several heads behind a gate."""

from collections.abc import Iterable, Iterator

import torch

from annotate_data.conversations import token_ids
from annotate_data.loaded import limits
from annotate_data.work import Score, Task
from baton.models import loading
from baton.models.batching import batches, windows
from baton.models.scoring import custom_rewards
from baton.models.templates import load_tokenizer

EQUAL_LENGTHS = 1.0  # unknown code might take padding for text, so it gets none


class CustomModel:
    """A reward model whose code is in its folder. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = load_tokenizer(path, settings.chat_template, trust_remote_code=True)
        model = loading.load(AutoModelForSequenceClassification, path, settings.dtype, trust_remote_code=True)
        self.model = loading.moved(model, device, settings.dtype)
        self.limits = limits(self.model, device, settings)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            sequences, notes = token_ids(self.tokenizer, window, self.limits.conversation)
            for batch in batches([len(ids) for ids in sequences], self.limits.batch, EQUAL_LENGTHS):
                for i, reward in zip(batch, custom_rewards(self.model, [sequences[i] for i in batch]), strict=True):
                    yield Score(*window[i], reward, notes[i])
