"""Check data, or convert it to Baton's records. It reads files of every common shape (docs/data.md).

    python -m baton.data check FILE [--as prompts|demonstrations|preferences|labelled] [--tokenizer MODEL]
    python -m baton.data convert FILE OUT [--as …] [--dedup exact|near] [--max_response_characters N] [--split 0.05]

FILE is a .jsonl, .jsonl.gz, .json or .parquet file or a dataset of the Hugging Face hub; several have commas between. `check`
prints what it takes the file for, what cannot be read and why, lengths, duplicates, and three records as a model reads them,
what it learns between the marks ⟦ and ⟧. It ends with 3 where records were refused. `convert` leaves those out, and its
manifest says which.
"""

import sys

from baton import program
from baton.arguments import parse
from baton.data.arguments import CheckArguments, ConvertArguments
from baton.data.check import check
from baton.errors import InputError

PLACES = {"check": ["--dataset_name_or_path"], "convert": ["--dataset_name_or_path", "--output_dir"]}


def main() -> None:
    command, words = flags(sys.argv[1:])
    if command == "check":
        check(parse(CheckArguments, __doc__, words))
        return
    from baton.data.convert import convert

    convert(parse(ConvertArguments, __doc__, words))


def flags(words: list[str]) -> tuple[str, list[str]]:
    """The command, and its words with a flag before each: FILE and OUT may stand without, and `--as` is named `--kind` within.

    Raises InputError for another command, and for more files than it takes.
    """
    command, *words = words or ["--help"]
    if command in ("-h", "--help"):
        command, words = "check", ["--help"]
    if command not in PLACES:
        raise InputError(f"`{command}`: the commands are {' and '.join(PLACES)}; --help explains them")
    named = []
    for flag in PLACES[command]:
        if words and not words[0].startswith("-"):
            named += [flag, words.pop(0)]
    if words and not words[0].startswith("-"):
        raise InputError(f"`{words[0]}`: one word too many before the flags; several files have commas between, without blanks")
    return command, [*named, *("--kind" + word[4:] if word.partition("=")[0] == "--as" else word for word in words)]


if __name__ == "__main__":
    program.run(main)
