"""From pairs, or what another `loss_type` learns from, to a data set of the token ids that a reward model reads."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.models.templates import conversation_token_ids
from baton.pairs import checked_pair
from baton.steps import separator_of
from reward_model.score_rows import rows_of_scores, rows_of_steps

log = logging.getLogger("baton")


class Rows(NamedTuple):
    """A data set of token ids, mapped from disk.

    What was dropped, and what was noted of the rest, knows process 0, which alone reads the records. `margins` are those of
    pairs, float64 (N,), NaN where one has none.
    """

    data: Any
    drops: Drops
    noted: Counter[str]
    margins: Any = None


def rows_of(examples: Iterable[tuple[str, Record]], name: str, arguments: Any, tokenizer: Any, config: Any) -> Rows:
    """The rows of `examples`, a data set called `name`; `arguments` are those of run_rm.py.

    Raises InputError where nothing is left, and where `margin_scale` needs a margin that a pair has not.
    """
    from datasets import List, Value

    ids, number = List(Value("int64")), Value("int64")
    if arguments.loss_type == "bradley_terry":
        make = partial(rows_of_preferences, tokenizer, config.max_length)
        columns = {"chosen_ids": ids, "rejected_ids": ids, "margin": Value("float64")}
        return _with_margins(_data_set(make, examples, name, config, columns), arguments.margin_scale)
    if arguments.loss_type == "process":
        make = partial(rows_of_steps, tokenizer, config.max_length, separator_of(arguments.step_separator))
    else:
        pad = tokenizer.convert_tokens_to_ids(config.pad_token or tokenizer.pad_token or tokenizer.eos_token)  # as TRL
        make = partial(rows_of_scores, tokenizer, config.max_length, pad)
    columns = {"sequences": List(ids), "places": List(ids), "targets": List(Value("float64"))}
    columns |= {"shared": number, "lengths": ids, "reads": number}
    return _data_set(make, examples, name, config, columns)


def _data_set(
    make: Callable[..., Iterator[dict[str, Any]]],
    examples: Iterable[tuple[str, Record]],
    name: str,
    config: Any,
    columns: dict[str, Any],
) -> Rows:
    """What `make` gives of examples, with columns of these types."""
    from datasets import Features

    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    drops, noted = Drops(), Counter()

    def token_ids():
        left = False
        for row in tokenised(make, examples, drops, noted):
            left = True
            yield row
        if not left:
            what = "pair" if "chosen_ids" in columns else "record"
            raise InputError(f"no {what} is left ({name}); dropped: {drops}")

    data = rows_on_disk(token_ids, config, name, Features(columns))
    for what, count in noted.items():
        log.warning("%s: %d %s", name, count, what)
    return Rows(data, drops, noted)


def _with_margins(rows: Rows, scale: float) -> Rows:
    """Rows of pairs with their margins apart; with a `scale`, `scale` times each is the column `margin` that the loss reads."""
    import numpy as np

    margins = np.array(rows.data["margin"][:], dtype=np.float64)
    data = rows.data.remove_columns("margin")
    if scale:
        if without := int(np.isnan(margins).sum()):
            raise InputError(
                f"`margin_scale` needs the margin of every pair, but {without} pairs have neither `margin` nor `chosen_reward` "
                "and `rejected_reward`; leave them out, or leave `margin_scale` at 0"
            )
        data = data.add_column("margin", scale * margins)
    return rows._replace(data=data, margins=margins)


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
