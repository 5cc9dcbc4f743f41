"""The shell's way to baton.launch: run one program, print the GPUs, or refuse secrets.

    python -m baton.launch run --name NAME --environment training [--log FILE] [--gpus N] PROGRAM [ARGUMENT ...]
    python -m baton.launch gpus
    python -m baton.launch refuse-secrets --name NAME

`run` ends with the program's exit code. On several GPUs, `accelerate launch` starts a process for each. `refuse-secrets` reads
words, each ended by a zero byte, from stdin, and ends with exit code 2 if one of them holds a secret.
"""

import argparse
import logging
import sys
from pathlib import Path

from baton import launch, program
from baton.errors import InputError
from baton.launch import gpus
from baton.launch.unit import ENVIRONMENTS, Unit, refuse_secrets
from baton.launch.words import positive


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baton.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("gpus", help="print the GPUs that may be used")
    check = commands.add_parser("refuse-secrets", help="check the words on stdin before they are on a command line")
    check.add_argument("--name", required=True, help="stands in messages")
    run = commands.add_parser("run", help="run a program to its end", allow_abbrev=False)
    run.add_argument("--name", required=True, help="stands in messages")
    run.add_argument("--environment", required=True, choices=ENVIRONMENTS)
    run.add_argument("--log", type=Path, help="the file that output is appended to")
    run.add_argument("--gpus", type=int, metavar="N", default=0, help="GPUs for it alone, a process each [it sees all]")
    run.add_argument("--processes", type=positive, metavar="N", help="how many processes, if not one for each GPU")
    run.add_argument("--accelerate_config", help="the file for `accelerate launch`, on GPUs")
    run.add_argument("program", nargs=argparse.REMAINDER, help="what stands after `python`")
    arguments = parser.parse_args()

    launch.check_launcher()
    if arguments.command == "gpus":
        print(*gpus.visible())
        return
    if arguments.command == "refuse-secrets":
        refuse_secrets(arguments.name, sys.stdin.read().split("\0"))
        return
    if not arguments.program:
        raise InputError(f"{arguments.name}: which program?")
    unit = Unit(
        name=arguments.name,
        environment=arguments.environment,
        program=tuple(arguments.program),
        gpus=arguments.gpus,
        processes=arguments.processes or max(arguments.gpus, 1),
        accelerate_config=arguments.accelerate_config,
        log=arguments.log,
    )
    launch.run([unit])


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    program.run(main)
