"""Add the gold score of each response to a generated or annotated file: `rewards_by: {"gold": [K floats]}`.

    python quickstart/score_gold.py --dataset_name_or_path heldout.jsonl --output_dir heldout_gold.jsonl

For evaluation alone: the loop learns from the trained reward model. All other keys stay as they are.
"""

from collections.abc import Iterator
from pathlib import Path

from baton import jsonl, program
from baton.ahead import will_be_made
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.jsonl import Record
from baton.records import prompt_of, responses_of
from baton.stage import Stage
from quickstart.gold import gold_score


class Arguments(StageArguments):
    dataset_name_or_path: Path = option(..., "JSONL of prompts with K responses", changes_result=False)
    output_dir: Path = option(..., "JSONL file to write", changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    source = arguments.dataset_name_or_path
    if not source.is_file() and not will_be_made(source):
        raise InputError(f"{source}: no such file; name a generated JSONL file with --dataset_name_or_path")
    stage = Stage.begin("score_gold", arguments, arguments.output_dir, {"dataset": source})
    if stage is None:
        return
    count = jsonl.write(arguments.output_dir, with_gold(source))
    stage.finish(records_in=count, records_out=count)


def with_gold(path: Path) -> Iterator[Record]:
    """Each record of `path` with its gold scores in `rewards_by`. Raises InputError for a bad record."""
    empty = True
    for where, record in jsonl.read(path):
        empty = False
        prompt_text = prompt_of(record, where)[-1]["content"]
        scores = [gold_score(prompt_text, response) for response in responses_of(record, where)]
        yield record | {"rewards_by": record.get("rewards_by", {}) | {"gold": scores}}
    if empty:
        raise InputError(f"{path}: the file is empty")


if __name__ == "__main__":
    program.run(main)
