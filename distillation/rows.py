"""What there is to learn from in the data: the responses that a record holds, or a demonstration."""

from collections.abc import Iterator
from typing import Any

from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.prompts import mixed_records
from baton.records import how_sampled, prompt_of, responses_of
from baton.training.data import dataset_probs
from baton.training.demonstrations import Demonstration, demonstration_in


def examples(arguments: Any, source: str) -> Iterator[Demonstration]:
    """Yield what is to be learnt of `source`, of the first `max_samples` records that are trained on.

    `arguments` are those of run_kd.py. Raises InputError on the first bad record.
    """
    trained_on = source == arguments.dataset_name_or_path
    probs, most = (dataset_probs(arguments), arguments.max_samples) if trained_on else (None, None)
    records = mixed_records(source, arguments.dataset_split, probs, max_samples=most)
    for where, record in with_usual_keys(records, {"prompt": arguments.dataset_key, "response": arguments.output_key}):
        yield from examples_of(record, where)


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
