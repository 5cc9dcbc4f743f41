"""From annotated responses or preferences to the pairs, and from pairs or examples to the token ids that are trained on."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from baton import jsonl
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import PairSettings, candidates, checked_pair, pairs_of, why_left_out
from baton.preferences import preference_of, preference_records
from baton.program import harmless
from baton.prompts import with_ids
from baton.records import check_token_ids, responses_of
from baton.stage import Drops
from baton.templates import decodes_to, prompt_token_ids, response_token_ids

log = logging.getLogger("baton")

NO_MARGIN = "pairs without a margin"
EARLIER = "pairs of earlier rounds"
SAMPLED = "responses with sampled token ids"
FROM_TEXT = "responses tokenised from text"
FOREIGN = "responses with another tokenizer's token ids"
CUT = "responses cut to max_length"
NO_TOKEN = "a response without a token"

EXAMPLES = 3
SHOWN = 300  # characters of a text that an example shows, half from its start and half from its end


def choose_pairs(
    records: Iterable[tuple[str, Record]], settings: PairSettings, drops: Drops, counted: Counter[str]
) -> Iterator[Record]:
    """Yield the pairs of ("file:line", record): chosen among annotated responses, or as a preference file gives them.

    What a pair holds beside its texts (token ids, rewards, margin, finish reasons) stays. `counted["in"]` becomes the number
    of pairs asked for: pairs and drops together.
    """
    for where, record in with_ids(_readable(records)):
        if "responses" in record:
            counted["in"] += candidates(len(responses_of(record, where)), settings)
            for ids in record.get("response_token_ids") or ():
                check_token_ids(ids, where, "response_token_ids")
            yield from pairs_of([(where, record)], settings, drops)
            continue
        pair = checked_pair(record, where)
        counted["in"] += 1
        if reason := why_left_out(pair, settings):
            drops.add(reason, pair["id"])
        else:
            counted[NO_MARGIN] += pair.get("margin") is None
            yield pair


def _readable(records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
    """Yield annotated records as they are and preferences in one shape. Raises InputError for what is neither."""
    for where, record in records:
        if "responses" in record:
            yield where, record
        elif "chosen" in record or "rejected" in record:
            yield where, record | preference_of(record, where)
        else:
            found = ", ".join(f"`{name}`" for name in record) or "no keys"
            raise InputError(f"{where}: needs `responses` and `rewards`, or `chosen` and `rejected`; the record has {found}")


def earlier_pairs(pairs: Path, rounds: int) -> list[Path]:
    """The pairs files of the `rounds` rounds before that of `pairs`, which is a file in a folder named `round<i>`.

    They have the same name in the folders beside it; those that do not exist are left out, which the log says. Raises
    InputError if the folder has another name.
    """
    if not rounds:
        return []
    folder = pairs.absolute().parent
    match = re.fullmatch(r"round([0-9]+)", folder.name)
    if match is None:
        raise InputError(
            f"`history` finds the rounds before by their folders, round1, round2, …, but {pairs} is in `{folder.name}`: "
            "give --pairs_path RUN/round<i>/pairs.jsonl, or leave `history` out"
        )
    number = int(match[1])
    paths = [folder.with_name(f"round{i}") / pairs.name for i in range(max(0, number - rounds), number)]
    found = [path for path in paths if path.is_file()]
    log.info("history of %d rounds: %s", rounds, ", ".join(map(str, found)) or "no earlier round has pairs")
    return found


def pairs_again(paths: Iterable[Path], counted: Counter[str]) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", pair) of the pairs files of earlier rounds, added to `counted["in"]`."""
    for path in paths:
        for where, record in preference_records(jsonl.read(path)):
            pair = checked_pair(record, where)
            counted["in"] += 1
            counted[EARLIER] += 1
            counted[NO_MARGIN] += pair.get("margin") is None
            yield where, pair


def at_least_one(pairs: Iterator[dict[str, Any]], source: str, drops: Drops) -> Iterator[dict[str, Any]]:
    """Yield the pairs of `source`. Raises InputError if there is none, saying which filter took how many."""
    empty = True
    for pair in pairs:
        empty = False
        yield pair
    if empty:
        raise InputError(f"{source}: no pair is left; dropped: {drops}; loosen what drops the most")


def token_rows(
    pairs: Iterable[tuple[str, Record]],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    drops: Drops,
    counted: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield `prompt_ids`, `chosen_ids`, `rejected_ids` and `margin` for each ("file:line", pair).

    Sampled token ids are used as they are where this tokenizer is the one that sampled them, else the text is tokenised; the
    end-of-turn token is there only where the response stopped by itself. A prompt longer than `max_prompt_length` tokens is
    dropped; a response is cut so that prompt and response have at most `max_length` tokens.
    """
    for where, pair in pairs:
        row = _row(pair, ("chosen", "rejected"), tokenizer, max_length, max_prompt_length, drops, counted, where)
        if row is None:
            continue
        if row["chosen_ids"] == row["rejected_ids"]:
            drops.add("identical within max_length", pair["id"])
        elif not row["chosen_ids"] or not row["rejected_ids"]:
            drops.add(NO_TOKEN, pair["id"])
        else:
            yield {**row, "margin": float(pair.get("margin") or 0.0)}


def labelled_rows(
    examples: Iterable[tuple[str, Record]],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    drops: Drops,
    counted: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield `prompt_ids`, `completion_ids` and `label` for each ("file:line", example), by the rules of `token_rows`."""
    for where, example in examples:
        row = _row(example, ("completion",), tokenizer, max_length, max_prompt_length, drops, counted, where)
        if row is None:
            continue
        if not row["completion_ids"]:
            drops.add(NO_TOKEN, example["id"])
        else:
            yield {**row, "label": example["label"]}


def _row(
    record: Record,
    sides: tuple[str, ...],
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
    drops: Drops,
    counted: Counter[str],
    where: str,
) -> dict[str, list[int]] | None:
    """`prompt_ids` and the `…_ids` of each of a record's responses, or None where the prompt is too long."""
    prompt_ids = prompt_token_ids(tokenizer, record["prompt"], where)
    if len(prompt_ids) > max_prompt_length:
        drops.add(f"prompt longer than max_prompt_length {max_prompt_length} tokens", record["id"])
        return None
    row = {"prompt_ids": prompt_ids}
    for side in sides:
        ids = _response_ids(record, side, tokenizer, where, counted)
        counted[CUT] += len(prompt_ids) + len(ids) > max_length
        row[f"{side}_ids"] = ids[: max_length - len(prompt_ids)]
    return row


def _response_ids(record: Record, side: str, tokenizer: Any, where: str, counted: Counter[str]) -> list[int]:
    sampled = record.get(f"{side}_token_ids")
    if sampled and decodes_to(tokenizer, sampled, record[side]):
        counted[SAMPLED] += 1
        return sampled
    counted[FROM_TEXT] += 1
    if sampled:
        if not counted[FOREIGN]:
            highest = max(sampled)
            says = f"id {highest} of {len(tokenizer)}" if highest >= len(tokenizer) else "they do not decode to the text"
            log.warning("%s: `%s_token_ids` are not this tokenizer's (%s), so the text is tokenised", where, side, says)
        counted[FOREIGN] += 1
    stopped = record.get(f"{side}_finish_reason") in (None, "stop")
    return response_token_ids(tokenizer, record["prompt"], record[side], stopped, where)


def log_rows(rows: Any, tokenizer: Any, drops: Drops, counted: Counter[str]) -> None:
    """Say what was kept, dropped and why, and show some rows with what is learnt marked: for the start of the log."""
    log.info("%d in, %d to train on, dropped: %s", counted["in"], len(rows), drops)
    log.info("among them: %s", account(counted))
    if counted[FOREIGN]:
        log.warning(
            "%d of %d responses have token ids that are not this tokenizer's, so their text is tokenised again. That is right "
            "where a model with another tokenizer sampled them; else --model_name_or_path is not the policy that did",
            counted[FOREIGN],
            counted[SAMPLED] + counted[FROM_TEXT],
        )
    for number in sorted({len(rows) * i // EXAMPLES for i in range(EXAMPLES)}):
        log.info("row %d, what is learnt in ⟦ ⟧:\n%s", number, shown(rows[number], tokenizer))


def account(counted: Counter[str]) -> str:
    """What the counts say, but for the number that went in."""
    return ", ".join(f"{count} {name}" for name, count in counted.items() if count and name != "in")


def shown(row: dict[str, Any], tokenizer: Any) -> str:
    """A row of token ids as text, special tokens included, the tokens that the loss reads between ⟦ and ⟧.

    Models' words are not trusted: what could command a terminal, or pass for a mark, is escaped. Long texts are shortened in
    the middle.
    """
    lines = []
    for name, ids in row.items():
        if not name.endswith("_ids"):
            lines.append(f"  {name:10} {ids}")
            continue
        text = harmless(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        text = text.replace("⟦", "\\u27e6").replace("⟧", "\\u27e7")
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        text = text if name == "prompt_ids" else f"⟦{text}⟧"
        lines.append(f"  {name.removesuffix('_ids'):10} {len(ids):5} tokens: {text}")
    return "\n".join(lines)
