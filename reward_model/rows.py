"""From preference pairs to the token ids that a reward model reads."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from baton.drops import Drops
from baton.jsonl import Record
from baton.models.templates import conversation_token_ids
from baton.pairs import checked_pair


def rows_of_preferences(
    tokenizer: Any, max_length: int, pairs: Iterable[tuple[str, Record]], drops: Drops, _: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row `chosen_ids`, `rejected_ids`, `margin` for each ("where", pair) that fits; `drops` gets the others.

    The margin is the pair's `margin`, or else its `chosen_reward` minus `rejected_reward`; None where it has neither.
    """
    for where, record in pairs:
        row = {}
        for side in ("chosen", "rejected"):
            conversation = [*record["prompt"], {"role": "assistant", "content": record[side]}]
            row[f"{side}_ids"] = conversation_token_ids(tokenizer, conversation, where)
        if max(map(len, row.values())) > max_length:
            drops.add(f"longer than max_length {max_length} tokens", where)
        else:
            margin = checked_pair(record, where).get("margin")
            yield {**row, "margin": None if margin is None else float(margin)}
