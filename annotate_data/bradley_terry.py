"""Rewards of a Bradley-Terry model: a sequence classifier with one output, read at the last token of the conversation."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

import models
from baton.templates import conversation_token_ids, load_tokenizer
from batching import batches, padded, windows
from work import Score, Task

TRUNCATED = "truncated: longer than max_length tokens, so the conversation's beginning was left out"


class BradleyTerry:
    """A reward model on one device. Call it with tasks: it yields the score of each missing response.

    The conversation, response included, is written by the reward model's own chat template. One longer than `max_length`
    tokens loses its beginning, never its end, where the reward is read; its score carries a note.
    """

    def __init__(
        self,
        path: str,
        device: torch.device,
        dtype: models.Dtype = "auto",
        max_length: int | None = None,
        tokens_per_batch: int | None = None,
        chat_template: str | None = None,
    ):
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = load_tokenizer(path, chat_template)
        self.model = models.load(AutoModelForSequenceClassification, path, dtype).to(device)
        self.device = device
        self.max_length = models.longest_input(self.model, max_length)
        self.tokens_per_batch = tokens_per_batch or models.TOKENS_PER_BATCH[device.type]
        self.least_filled = models.LEAST_FILLED[device.type]

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            sequences = self.token_ids(window)
            lengths = [len(ids[-self.max_length :]) for ids in sequences]
            for batch in batches(lengths, self.tokens_per_batch, self.least_filled):
                rewards = self.rewards([sequences[i][-self.max_length :] for i in batch])
                for i, reward in zip(batch, rewards, strict=True):
                    task, index = window[i]
                    note = TRUNCATED if len(sequences[i]) > self.max_length else None
                    yield Score(task, index, reward, note)

    def token_ids(self, window: list[tuple[Task, int]]) -> list[list[int]]:
        """The token ids of each conversation. Raises InputError naming the record that the template refuses."""
        conversations = [
            [*task.prompt, {"role": "assistant", "content": task.responses[i]}] for task, i in window
        ]
        return conversation_token_ids_of_all(
            self.tokenizer, conversations, [task.where for task, _ in window]
        )

    @torch.inference_mode()
    def rewards(self, sequences: list[list[int]]) -> list[float]:
        """The reward of each sequence of token ids; the head is computed in float32, so that bfloat16 makes no ties."""
        pad = self.model.config.get_text_config().pad_token_id
        ids, lengths = padded(sequences, pad or 0, self.device)  # (B, L), (B,)
        if hasattr(self.model, "score"):
            states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, D)
            last = torch.tensor(
                [_last_but_padding(sequence, pad) for sequence in sequences], device=self.device
            )
            states = states[torch.arange(len(sequences), device=self.device), last].float()  # (B, D)
            return F.linear(states, self.model.score.weight.float(), _float(self.model.score.bias))[
                :, 0
            ].tolist()
        mask = (
            torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        )  # (B, L), for models that are not causal
        return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float().tolist()


def conversation_token_ids_of_all(tokenizer, conversations: list, wheres: list[str]) -> list[list[int]]:
    """`conversation_token_ids` of many conversations at once, which tokenises them in parallel."""
    import jinja2

    try:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    except (jinja2.TemplateError, TypeError, KeyError):  # one by one, to name the record
        return [conversation_token_ids(tokenizer, *both) for both in zip(conversations, wheres, strict=True)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _last_but_padding(sequence: list[int], pad: int | None) -> int:
    """Where transformers reads the reward: the last token that is not the padding token, which may end a response too."""
    return next((place for place in range(len(sequence) - 1, -1, -1) if sequence[place] != pad), 0)


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()
