"""The prompts of an online training: tokenised once, on disk, and in an order that a number says.

Position p of the endless order is prompt `order(p)`: one shuffle of all prompts after another. So a checkpoint that knows how
many prompts were taken knows all that there is to know.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.models.templates import prompt_token_ids, template_hash
from baton.pairs import PER_RESPONSE_KEYS
from baton.prompts import PromptSet
from baton.training.rows import rows_on_disk

log = logging.getLogger("baton")


class Prompts:
    """Tokenised prompts. Raises InputError where none is left.

    Args:
        dataset: rows with `record`, JSON, and `prompt_token_ids`.
        seed: of the shuffles.
    """

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed
        self.shuffle: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def at(self, position: int) -> Record:
        """The record at a position of the endless order, with `prompt_token_ids`."""
        epoch, place = divmod(position, len(self))
        if self.shuffle is None or self.shuffle[0] != epoch:
            self.shuffle = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self.first(int(self.shuffle[1][place]))

    def first(self, index: int) -> Record:
        """The record of a number in the order of the file."""
        row = self.dataset[index]
        return {**orjson.loads(row["record"]), "prompt_token_ids": row["prompt_token_ids"]}


def tokenised_prompts(
    prompts: PromptSet, tokenizer: Any, longest: int, config: Any, name: str, seed: int
) -> tuple[Prompts, Drops]:
    """A prompt set's records as token ids; those of more than `longest` tokens are dropped and counted."""
    drops = Drops()

    def rows() -> Iterator[dict[str, Any]]:
        kept = 0
        template = template_hash(tokenizer)
        for _, where, record, messages in prompts.shard(0, 1):
            ids = prompt_token_ids(tokenizer, messages, where)
            if len(ids) > longest:
                drops.add(f"prompt longer than {longest} tokens", f"{record['id']} ({where}, {len(ids)} tokens)")
                continue
            kept += 1
            known = {key: value for key, value in record.items() if key not in PER_RESPONSE_KEYS}
            yield {"record": orjson.dumps({**known, "chat_template_hash": template}).decode(), "prompt_token_ids": ids}
        if not kept:
            raise InputError(f"no prompt is left: all {len(prompts)} have more than {longest} tokens (`max_prompt_length`)")

    return Prompts(rows_on_disk(rows, config, name), seed), drops
