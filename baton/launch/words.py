"""Command lines of programs that start others: argparse, with errors as every program of the project reports them."""

import argparse

from baton.errors import InputError


def new_parser(prog: str, description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser of full flag names, whose description keeps its lines; `parse_known` reads with it."""
    return argparse.ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )


def parse_known(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What `parser`, made with `exit_on_error=False`, reads from `words`, and the words that it has no flag for.

    Raises InputError for a flag without its value, or with one that does not convert.
    """
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        problem = "needs a value" if error.message.startswith("expected") else error.message
        raise InputError(f"{error.argument_name} {problem}") from None


def positive(text: str) -> int:
    """The `type` of a flag whose value is a whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive number, not '{text}'")
    return int(text)
