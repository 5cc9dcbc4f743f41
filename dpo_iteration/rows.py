"""From pairs or labelled examples to the token ids that are trained on."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.models.templates import (
    FOREIGN,
    FROM_TEXT,
    OTHER_TEMPLATE,
    SAMPLED,
    prompt_token_ids,
    sampled_or_tokenised,
    template_hash,
    template_warning,
)
from baton.program import harmless
from dpo_iteration.account import IN, in_words
from dpo_iteration.xpo import COLUMN, reference_is_chosen

log = logging.getLogger("baton")

CUT = "responses cut to max_length"
NO_TOKEN = "a response without a token"

EXAMPLES = 3
SHOWN = 300  # characters of a text that an example shows, half from its start and half from its end


def check_lengths(max_prompt_length: int, max_length: int) -> None:
    """Raise InputError where a prompt of the longest that is taken would leave no token for a response."""
    if max_prompt_length >= max_length:
        raise InputError(
            f"`max_prompt_length`: {max_prompt_length} must be smaller than `max_length`, {max_length}: no token would be left "
            "for the response"
        )


@dataclass(frozen=True)
class Rows:
    """Makes rows of token ids. As they are read, `drops` gets the records that give no row, and `counted` counts the others.

    Sampled token ids are used as they are where this tokenizer is the one that sampled them, else the text is tokenised; the
    end-of-turn token is there only where the response stopped by itself. A prompt longer than `max_prompt_length` tokens is
    dropped; a response is cut so that prompt and response have at most `max_length` tokens. Records whose `chat_template_hash`
    is not that of this tokenizer are counted, unless a model with another tokenizer sampled them.
    """

    tokenizer: Any
    max_length: int
    max_prompt_length: int
    drops: Drops
    counted: Counter[str]

    @cached_property
    def template(self) -> str:
        return template_hash(self.tokenizer)

    def of_pairs(self, pairs: Iterable[tuple[str, Record]]) -> Iterator[dict[str, Any]]:
        """Yield `prompt_ids`, `chosen_ids`, `rejected_ids`, and what is None if unknown, for each ("file:line", pair).

        That is the `margin`, and `reference_is_chosen` (`xpo.py`).
        """
        for where, pair in pairs:
            of_reference = reference_is_chosen(pair, where)
            row = self._row(pair, ("chosen", "rejected"), where)
            if row is None:
                continue
            if row["chosen_ids"] == row["rejected_ids"]:
                self.drops.add("identical within max_length", pair["id"])
            elif not row["chosen_ids"] or not row["rejected_ids"]:
                self.drops.add(NO_TOKEN, pair["id"])
            else:
                margin = pair.get("margin")
                yield {**row, "margin": None if margin is None else float(margin), COLUMN: of_reference}

    def of_examples(self, examples: Iterable[tuple[str, Record]]) -> Iterator[dict[str, Any]]:
        """Yield `prompt_ids`, `completion_ids` and `label` for each ("file:line", labelled example)."""
        for where, example in examples:
            row = self._row(example, ("completion",), where)
            if row is None:
                continue
            if not row["completion_ids"]:
                self.drops.add(NO_TOKEN, example["id"])
            else:
                yield {**row, "label": example["label"]}

    def _row(self, record: Record, sides: tuple[str, ...], where: str) -> dict[str, list[int]] | None:
        """`prompt_ids` and the `…_ids` of each of a record's responses, or None where the prompt is too long."""
        prompt_ids = prompt_token_ids(self.tokenizer, record["prompt"], where)
        if len(prompt_ids) > self.max_prompt_length:
            self.drops.add(f"prompt longer than max_prompt_length {self.max_prompt_length} tokens", record["id"])
            return None
        row, sources = {"prompt_ids": prompt_ids}, set()
        for side in sides:
            ids, source = self._response_ids(record, side, where)
            sources.add(source)
            self.counted[CUT] += len(prompt_ids) + len(ids) > self.max_length
            row[f"{side}_ids"] = ids[: self.max_length - len(prompt_ids)]
        template = record.get("chat_template_hash")
        if template and template != self.template and FOREIGN not in sources:
            self.counted[f"{OTHER_TEMPLATE} {harmless(str(template))}"] += 1
        return row

    def _response_ids(self, record: Record, side: str, where: str) -> tuple[list[int], str]:
        """The token ids of a response, and where they come from."""
        tokenizer, counted = self.tokenizer, self.counted
        sampled, reason = record.get(f"{side}_token_ids"), record.get(f"{side}_finish_reason")
        ids, source = sampled_or_tokenised(tokenizer, record["prompt"], record[side], sampled, reason, where)
        if source == FOREIGN and not counted[FOREIGN]:
            highest = max(sampled)
            says = f"id {highest} of {len(tokenizer)}" if highest >= len(tokenizer) else "they do not decode to the text"
            log.warning("%s: `%s_token_ids` are not this tokenizer's (%s), so the text is tokenised", where, side, says)
        counted[SAMPLED] += source == SAMPLED
        counted[FROM_TEXT] += source != SAMPLED
        counted[FOREIGN] += source == FOREIGN
        return ids, source


def rows_of_pairs(
    tokenizer: Any, max_length: int, max_prompt_length: int, pairs: Iterable[tuple[str, Record]], drops: Drops,
    counted: Counter[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """`Rows.of_pairs`, as `baton.training.tokenising` calls it."""
    return Rows(tokenizer, max_length, max_prompt_length, drops, counted).of_pairs(pairs)


def rows_of_examples(
    tokenizer: Any, max_length: int, max_prompt_length: int, examples: Iterable[tuple[str, Record]], drops: Drops,
    counted: Counter[str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """`Rows.of_examples`, as `baton.training.tokenising` calls it."""
    return Rows(tokenizer, max_length, max_prompt_length, drops, counted).of_examples(examples)


def log_rows(rows: Any, tokenizer: Any, drops: Drops, counted: Counter[str]) -> None:
    """Log what was kept, dropped and why, and show some rows with what is learnt marked: for the start of the log."""
    log.info("%d in, %d to train on, dropped: %s", counted[IN], len(rows), drops)
    log.info("among them: %s", in_words(counted))
    if counted[FOREIGN]:
        log.warning(
            "%d of %d responses have token ids that are not this tokenizer's, so their text is tokenised again. That is right "
            "where a model with another tokenizer sampled them; else --model_name_or_path is not the policy that did",
            counted[FOREIGN],
            counted[SAMPLED] + counted[FROM_TEXT],
        )
    if warning := template_warning(counted, tokenizer):
        log.warning("%s", warning)
    for number in sorted({len(rows) * i // EXAMPLES for i in range(EXAMPLES)}):
        log.info("row %d, what is learnt in ⟦ ⟧:\n%s", number, shown(rows[number], tokenizer))


def shown(row: dict[str, Any], tokenizer: Any) -> str:
    """A row of token ids as text, special tokens included, the tokens that the loss reads between ⟦ and ⟧.

    Models' words are not trusted: what could command a terminal, or pass for a mark, is escaped. Long texts are shortened in
    the middle.
    """
    lines = []
    for name, ids in row.items():
        if ids is None:
            continue
        if not name.endswith("_ids"):
            lines.append(f"  {name:10} {ids:.4g}" if isinstance(ids, float) else f"  {name:10} {ids}")
            continue
        text = harmless(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text = text.replace("⟦", "\\u27e6").replace("⟧", "\\u27e7")
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        text = text if name == "prompt_ids" else f"⟦{text}⟧"
        lines.append(f"  {name.removesuffix('_ids'):10} {len(ids):5} tokens: {text}")
    return "\n".join(lines)
