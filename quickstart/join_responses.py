"""Put the responses of several files to the same prompts side by side: one record a prompt, with the responses of all files.

    python quickstart/join_responses.py --dataset_name_or_path praise.jsonl criticism.jsonl --output_dir both.jsonl

The files hold the same prompts in the same order, as two samplings of one prompt file do. What was asked of the policy beside
the prompt (`prompt_prefix`) is left out of the record: the reward model shall judge the response, not the request.
"""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from baton import jsonl, program
from baton.ahead import will_be_made
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.jsonl import Record
from baton.pairs import joined
from baton.records import prompt_of, responses_of
from baton.stage import Stage


class Arguments(StageArguments):
    dataset_name_or_path: list[Path] = option(..., "JSONL files of prompts with responses", changes_result=False)
    output_dir: Path = option(..., "JSONL file to write", changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    for source in arguments.dataset_name_or_path:
        if not source.is_file() and not will_be_made(source):
            raise InputError(f"{source}: no such file; name generated JSONL files with --dataset_name_or_path")
    inputs = {f"dataset{number}": source for number, source in enumerate(arguments.dataset_name_or_path)}
    stage = Stage.begin("join_responses", arguments, arguments.output_dir, inputs)
    if stage is None:
        return
    count = jsonl.write(arguments.output_dir, side_by_side(arguments.dataset_name_or_path))
    stage.finish(records_in=count, records_out=count)


def side_by_side(paths: list[Path]) -> Iterator[Record]:
    """The records of the first file with the responses of the others after their own.

    Raises InputError, naming file and line, where another file has another prompt, or none.
    """
    for (where, record), *others in zip_longest(*map(jsonl.read, paths), fillvalue=("the end of a shorter file", None)):
        if record is not None:
            responses_of(record, where)
        whole = record
        for other_where, other in others:
            if record is None or other is None or prompt_of(record, where) != prompt_of(other, other_where):
                raise InputError(f"{other_where}: not the prompt of {where}; sample the files from one prompt file")
            responses_of(other, other_where)
            whole = joined(whole, other)
        yield {name: value for name, value in whole.items() if name != "prompt_prefix"}


if __name__ == "__main__":
    program.run(main)
