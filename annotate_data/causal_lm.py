"""Log-probabilities of responses under a causal language model: ln p(response | prompt), in nats."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from annotate_data.conversations import REWRITTEN, check_conversation
from annotate_data.loaded import limits
from annotate_data.work import Score, Task
from baton.errors import InputError
from baton.jsonl import Record
from baton.models import loading
from baton.models.batching import batches, windows
from baton.models.scoring import Packing, packed_response_logps, response_logps
from baton.models.templates import SAMPLED, load_tokenizer, prompt_token_ids, sampled_or_tokenised, template_hash

# Of padded batches. Less than for rewards on a GPU: the logits of 8192 tokens over a vocabulary of 128k are 2 GiB in bfloat16.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}

TOO_LONG = "longer than max_length tokens"
OTHER_TEMPLATE = "sampled with another chat template, so after another prompt: give --chat_template FILE"
RETOKENISED = "tokenised again: no sampled token ids, or ids that this tokenizer does not read as the response"


class CausalLM:
    """A language model on one device. Call it with tasks: it yields the summed log-probability of each missing response.

    Summed are the sampled tokens where the record has their ids, so an end-of-turn token counts where it was sampled. A
    response that with its prompt is longer than `max_length` tokens has no score, and neither has one of another tokenizer
    whose text the chat template changes.
    """

    def __init__(self, path: str, device: torch.device, settings: loading.Settings):
        from transformers import AutoModelForCausalLM

        self.tokenizer = load_tokenizer(path, settings.chat_template)
        self.template = template_hash(self.tokenizer)
        self.model = loading.place(loading.load(AutoModelForCausalLM, path, settings.dtype), device, settings.dtype)
        self.limits = limits(self.model, device, settings, TOKENS_PER_BATCH)
        self.packing = Packing(self.model)

    def __call__(self, tasks: Iterable[Task]) -> Iterator[Score]:
        for window in windows((task, index) for task in tasks for index in task.missing):
            kept, sequences = [], []
            for task, index in window:
                prompt = prompt_token_ids(self.tokenizer, task.prompt, task.where)
                try:
                    response, note = self.response(task, index)
                except InputError:
                    check_conversation(self.tokenizer, task, index)
                    yield Score(task, index, None, REWRITTEN)
                    continue
                if len(prompt) + len(response) > self.limits.conversation:
                    yield Score(task, index, None, TOO_LONG)
                    continue
                kept.append((task, index, note))
                sequences.append((prompt, response))
            for i, logp in self.logps(sequences):
                task, index, note = kept[i]
                yield Score(task, index, logp, note)

    def logps(self, sequences: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, float]]:
        """Yield (index, log-probability) of each (prompt, response), in any order; prompts are shared where the model can."""
        if self.packing.agreed(sequences, self.limits.row):
            yield from packed_response_logps(self.model, sequences, self.limits.row)
            return
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        for batch in batches(lengths, self.limits.batch, self.limits.least_filled):
            whole, prompts = [[*sequences[i][0], *sequences[i][1]] for i in batch], [len(sequences[i][0]) for i in batch]
            yield from zip(batch, response_logps(self.model, whole, prompts), strict=True)

    def response(self, task: Task, index: int) -> tuple[list[int], str | None]:
        """The token ids of one response, with a note where they are not those that were sampled."""
        sampled, reason = _at(task.record, "response_token_ids", index), _at(task.record, "finish_reasons", index)
        text = task.responses[index]
        ids, source = sampled_or_tokenised(self.tokenizer, task.prompt, text, sampled, reason, task.where)
        if source != SAMPLED:
            return ids, RETOKENISED
        template = task.record.get("chat_template_hash", self.template)
        return ids, None if template == self.template else f"{OTHER_TEMPLATE} ({template}, here {self.template})"


def _at(record: Record, field: str, index: int) -> Any:
    values = record.get(field)
    return None if values is None else values[index]
