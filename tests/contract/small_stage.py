"""A small real stage, run as a process by the tests: writes each prompt's text in capitals, record by record.

It says on stdout after which record it is, and can be told to stop there until its stdin closes.
"""

import sys
from pathlib import Path

from baton import program
from baton.arguments import StageArguments, option, parse
from baton.drops import Drops
from baton.errors import FailuresListed
from baton.partial import PartialRecords
from baton.prompts import PromptSet
from baton.stage import Stage


class Arguments(StageArguments):
    dataset_name_or_path: str = option(..., "prompts", changes_result=False)
    output_dir: Path = option(..., "JSONL file to write", changes_result=False)
    K: int = option(1, "copies of the text", ge=1)
    drop: str = option("", "drop prompts that hold this text")
    wait_after: int = option(-1, "after this many records, wait until stdin closes", changes_result=False)
    fail: bool = option(False, "end as a stage with failures does", changes_result=False)
    crash: bool = option(False, "end as a stage with a bug does", changes_result=False)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    inputs = {"prompts": arguments.dataset_name_or_path}
    stage = Stage.begin("small", arguments, arguments.output_dir, inputs)
    if stage is None:
        return
    prompts = PromptSet(arguments.dataset_name_or_path)
    partial = PartialRecords(arguments.output_dir, len(prompts))
    import pyarrow  # a heavy package, as an engine would be

    program.log_what_runs(pyarrow=pyarrow.__version__)
    drops = Drops()
    for position, _, record, messages in prompts.shard(0, 1):
        if arguments.drop and arguments.drop in messages[-1]["content"]:
            drops.add("unwanted", record["id"])
        elif position not in partial:
            text = messages[-1]["content"].upper()
            partial.append(position, record | {"responses": [text] * arguments.K})
            print(position, flush=True)
            if position == arguments.wait_after:
                sys.stdin.read()
    if arguments.crash:
        raise ZeroDivisionError("a bug")
    written = partial.assemble()
    stage.finish(records_in=len(prompts), records_out=written, drops=drops)
    if arguments.fail:
        raise FailuresListed("prompt 3: the server refused it")


if __name__ == "__main__":
    program.run(main)
