"""What a model reads of a record: token ids in pieces, with what is learnt of them, and the same as a text to look at."""

from typing import Any

from baton.demonstrations import text_token_ids
from baton.jsonl import Record
from baton.models.templates import prompt_token_ids, response_pieces, sampled_or_tokenised
from baton.program import harmless
from baton.shapes import COLUMNS, Kind, parts_of

Pieces = list[tuple[list[int], bool]]  # token ids, and whether they are learnt

LEARNT = "⟦{}⟧"
LONGEST = 600  # characters of a piece that are shown


def pieces_of(tokenizer: Any, record: Record, kind: Kind, where: str) -> dict[str, Pieces]:
    """The parts of one of Baton's records as the training programs tokenise them. Raises InputError where a template cannot."""
    if kind == "demonstrations":
        if "messages" not in record:
            return {"text": [(text_token_ids(tokenizer, record["text"]), True)]}
        *prompt, last = record["messages"]
        sampled, reason = record.get("response_token_ids"), record.get("finish_reason")
        ids, _ = sampled_or_tokenised(tokenizer, prompt, last["content"], sampled, reason, where)
        return {"conversation": [*response_pieces(tokenizer, record["messages"], where)[:-1], (ids, True)]}
    prompt, responses = parts_of(record, kind)
    names = COLUMNS[kind]
    pieces: dict[str, Pieces] = {names[0]: [(prompt_token_ids(tokenizer, prompt, where), False)]}
    for name, response in zip(names[1:], responses, strict=True):
        sampled, reason = record.get(f"{name}_token_ids"), record.get(f"{name}_finish_reason")
        pieces[name] = [(sampled_or_tokenised(tokenizer, prompt, response, sampled, reason, where)[0], True)]
    return pieces


def shown_with_tokens(tokenizer: Any, pieces: dict[str, Pieces]) -> list[str]:
    """The parts as lines of text, what is learnt between marks."""

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return [f"{name}: " + "".join(_marked(text_of(ids), learnt) for ids, learnt in part) for name, part in pieces.items()]


def shown(record: Record, kind: Kind) -> list[str]:
    """One of Baton's records as lines of text: of each turn who says what, what is learnt between marks."""
    prompt, responses = parts_of(record, kind)
    learns_all = kind == "demonstrations"  # of a conversation every turn of the assistant
    lines = [f"{harmless(m['role'])}: {_marked(m['content'], learns_all and m['role'] == 'assistant')}" for m in prompt]
    lines += [f"{name}: {_marked(text, True)}" for name, text in zip(COLUMNS[kind][1:], responses, strict=True)]
    return [*lines, f"label: {record['label']}"] if kind == "labelled" else lines


def _marked(text: str, learnt: bool) -> str:
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    text = harmless(text).replace("⟦", "\\u27e6").replace("⟧", "\\u27e7")  # the marks are ours alone
    return LEARNT.format(text) if learnt else text
