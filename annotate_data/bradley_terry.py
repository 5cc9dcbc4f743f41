"""Rewards of a Bradley-Terry model: a sequence classifier with one output, read at the end of the conversation."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from annotate_data.conversations import token_ids
from annotate_data.work import Score, Task
from baton.models import loading
from baton.models.batching import batches, padded, windows
from baton.models.templates import load_tokenizer


class BradleyTerry:
    """A reward model on one device. Call it with tasks: it yields the score of each missing response."""

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = load_tokenizer(path, settings.chat_template)
        self.model = loading.place(loading.load(AutoModelForSequenceClassification, path, settings.dtype), device)
        self.device = device
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
            yield from zip(batch, self.rewards([sequences[i] for i in batch]), strict=True)

    @torch.inference_mode()
    def rewards(self, sequences: list[list[int]]) -> list[float]:
        """The reward of each sequence. The head is computed in float32: in bfloat16 it would make ties."""
        pad = self.model.config.get_text_config().pad_token_id
        ids, lengths = padded(sequences, pad or 0, self.device)  # (B, L), (B,)
        if hasattr(self.model, "score"):
            states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, D)
            last = torch.tensor([_end(sequence, pad) for sequence in sequences], device=self.device)
            states = states[torch.arange(len(sequences), device=self.device), last].float()  # (B, D)
            head = self.model.score
            return F.linear(states, head.weight.float(), None if head.bias is None else head.bias.float())[:, 0].tolist()
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]  # for models that are not causal
        return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float().tolist()


def _end(sequence: list[int], pad: int | None) -> int:
    """Where transformers reads the reward: the last token that is not the padding token, should a response end with it."""
    return next((place for place in range(len(sequence) - 1, -1, -1) if sequence[place] != pad), 0)
