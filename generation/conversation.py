"""A conversation of generation/chat.py: its turns, the messages that a model reads, and the record that is saved."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton import jsonl
from baton.errors import InputError
from baton.jsonl import Record
from baton.records import Messages
from generation.sampling import TEMPLATE_HASH, Completion


@dataclass
class Turn:
    """A question and its answer; `template` is the hash of the chat template that made its prompt, where that is known."""

    question: str
    answer: Completion | None = None
    model: str = ""
    template: str | None = None


@dataclass
class Conversation:
    """A system message, if there is one, and turns. All but the last one are answered."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self) -> Messages:
        """What a model reads before it answers the last question."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            if turn.answer and turn is not self.turns[-1]:
                messages.append({"role": "assistant", "content": turn.answer.text})
        return messages

    def record(self) -> Record:
        """The conversation as a demonstration: `messages`, and how the last response was sampled, where that is known.

        `sampled` says it of every response: the index of its message, its model, token ids and finish reason. Raises InputError
        where nothing is answered yet.
        """
        if not self.turns:
            raise InputError("nothing is answered yet")
        last, sampled = self.turns[-1], []
        for number, turn in enumerate(self.turns):
            how = {"response_token_ids": _ids(turn.answer), "finish_reason": turn.answer.finish_reason}
            how = {name: value for name, value in how.items() if value is not None}
            sampled.append({"message": bool(self.system) + 2 * number + 1, "model": turn.model, **how})
        messages = [*self.messages(), {"role": "assistant", "content": last.answer.text}]
        template = {TEMPLATE_HASH: last.template} if last.template else {}
        of_last = {name: value for name, value in sampled[-1].items() if name != "message"}
        return {"messages": messages, **of_last, **template, "sampled": sampled}


def append_record(path: Path, record: Record) -> None:
    """Add a record at the end of a JSON Lines file. Raises InputError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(max(0, file.seek(0, 2) - 1))
            unended = file.read() not in (b"", b"\n")
            file.write((b"\n" if unended else b"") + jsonl.dump(record).rstrip(b"\n") + b"\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _ids(answer: Any) -> list[int] | None:
    return None if answer.token_ids is None else list(answer.token_ids)
