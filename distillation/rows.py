"""What there is to learn from in a record: the responses that it holds, or a demonstration."""

from collections.abc import Iterator

from baton.jsonl import Record
from baton.records import how_sampled, prompt_of, responses_of
from baton.training.demonstrations import Demonstration, demonstration_in


def examples_of(record: Record, where: str) -> Iterator[Demonstration]:
    """Yield what there is to learn from in a record: each response of a generated one, or one demonstration.

    Raises InputError naming `where` and the field.
    """
    if "responses" not in record:
        yield demonstration_in(record, where)
        return
    prompt, template = prompt_of(record, where), record.get("chat_template_hash")
    for number, response in enumerate(responses_of(record, where)):
        sampled = how_sampled(record, number, "ids", "reason")
        messages = [*prompt, {"role": "assistant", "content": response}]
        name = f"{where}, response {number + 1}"
        yield Demonstration(name, messages, sampled.get("ids"), sampled.get("reason"), template, generated=True)
