"""The errors that a stage ends with, each with its exit code."""


class InputError(Exception):
    """Bad arguments or input: the message names file, line and field, and says what to do. Exit code 2."""

    exit_code = 2


class FailuresListed(Exception):
    """The stage finished what it could; the message lists what failed. Exit code 3."""

    exit_code = 3
