"""From demonstrations to the token ids that are trained on."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from baton.drops import Drops
from baton.models.templates import response_pieces
from baton.records import Messages


def rows_of_demonstrations(
    tokenizer: Any, max_length: int, demonstrations: Iterable[tuple[str, Messages]], drops: Drops, _: Counter[str]
) -> Iterator[dict[str, list[int]]]:
    """Yield a row `input_ids`, `labels` (-100 where nothing is learnt) for each ("where", conversation) that fits."""
    for where, messages in demonstrations:
        pieces = response_pieces(tokenizer, messages, where)
        input_ids = [id_ for ids, _ in pieces for id_ in ids]
        if len(input_ids) > max_length:
            drops.add(f"longer than max_length {max_length} tokens", where)
            continue
        yield {"input_ids": input_ids, "labels": [id_ if learnt else -100 for ids, learnt in pieces for id_ in ids]}
