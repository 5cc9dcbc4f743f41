"""The shell's way to baton.launch: run one program or several, plan them, check a recipe, or print the GPUs.

    python -m baton.launch run --name NAME --environment training [--log FILE] [--gpus N] PROGRAM [ARGUMENT ...]
    python -m baton.launch chain
    python -m baton.launch plan [--show]
    python -m baton.launch recipe --name NAME --known VARIABLE ... --new VARIABLE ...
    python -m baton.launch gpus

`run` ends with the program's exit code. On several GPUs, `accelerate launch` starts a process for each. `chain` and `plan` read
from stdin the words of several `run`s, each as their number and the words themselves, all ended by zero bytes. `chain` runs
them in turn, and those that follow each other and need the same environment and GPUs in one process. It ends at the first that
fails, with its exit code, but goes on after one that finished without some records (3). `plan` prints the names of those that
are up to date, one a line, and with `--show` what each would do. `recipe` reads VARIABLE=WORD of each word of a recipe's flags
from stdin, ended by zero bytes. Both end with exit code 2 where something is wrong.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from baton import ahead, launch, program
from baton.errors import InputError
from baton.launch import gpus, plan, recipe
from baton.launch.unit import ENVIRONMENTS, Unit, chains
from baton.launch.words import positive


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baton.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("gpus", help="print the GPUs that may be used")
    check = commands.add_parser("recipe", help="check the variables of a recipe")
    check.add_argument("--name", required=True, help="stands in messages")
    check.add_argument("--known", nargs="+", required=True, help="the variables that a recipe may set")
    check.add_argument("--new", nargs="*", default=[], help="the variables that it has set")
    commands.add_parser("chain", help="run several programs to their end, one after another")
    planned = commands.add_parser("plan", help="say what programs would do, and what is wrong with them")
    planned.add_argument("--show", action="store_true", help="print what each would do, and its command line")
    add_run(commands.add_parser("run", help="run a program to its end", allow_abbrev=False))
    arguments = parser.parse_args()

    launch.check_launcher()
    if arguments.command == "gpus":
        print(*gpus.visible())
    elif arguments.command == "recipe":
        words = [(word.partition("=")[0], word.partition("=")[2]) for word in stdin_words()]
        recipe.check(arguments.name, words, arguments.known, arguments.new)
    elif arguments.command == "plan":
        show_plan(list(units_on_stdin()), arguments.show)
    elif arguments.command == "chain":
        launch.run_in_turn(chains(units_on_stdin()))
    else:
        launch.run([unit_of(arguments)])


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments of `run`: a unit of work."""
    parser.add_argument("--name", required=True, help="stands in messages")
    parser.add_argument("--environment", required=True, choices=ENVIRONMENTS)
    parser.add_argument("--log", type=Path, help="the file that output is appended to")
    parser.add_argument("--gpus", type=int, metavar="N", default=0, help="GPUs for it alone, a process each [it sees all]")
    parser.add_argument("--processes", type=positive, metavar="N", help="how many processes, if not one for each GPU")
    parser.add_argument("--accelerate_config", help="the file for `accelerate launch`, on GPUs")
    parser.add_argument("--group", default="", help="in a `chain`, it shares a process only with others of this group")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="what stands after `python`")


def unit_of(arguments: argparse.Namespace) -> Unit:
    """The unit of work that the arguments of `run` describe. Raises InputError where they name no program."""
    if not arguments.program:
        raise InputError(f"{arguments.name}: which program?")
    return Unit(
        name=arguments.name,
        environment=arguments.environment,
        program=tuple(arguments.program),
        gpus=arguments.gpus,
        processes=arguments.processes or max(arguments.gpus, 1),
        accelerate_config=arguments.accelerate_config,
        log=arguments.log,
        group=arguments.group,
    )


def stdin_words() -> list[str]:
    """The words on stdin, each ended by a zero byte."""
    return sys.stdin.read().split("\0")[:-1]


def units_on_stdin() -> Iterator[Unit]:
    """Yield the units on stdin: for each its number of words, and the words."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_run(parser)
    words = iter(stdin_words())
    for count in words:
        yield unit_of(parser.parse_args(list(islice(words, int(count)))))


def show_plan(units: list[Unit], show: bool) -> None:
    """Print the plan, or the names of the units that are up to date. Raises InputError with the problems of all."""
    logging.getLogger("baton").setLevel(logging.WARNING)  # what each program says of itself is in the plan
    ahead.OUTLOOK.starts = not show
    entries = plan.plan(units)
    if show:
        print(plan.listing(entries))
    else:
        print(*(entry.unit.name for entry in entries if entry.up_to_date), sep="\n")
    if problems := plan.problems(entries):
        raise InputError(problems)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    program.run(main)
