"""No test: samples K responses to every prompt, on all GPUs of the machine (or on its CPU), and merges the shards.

    bash scripts/test_gen.sh --model_name_or_path MODEL --dataset_name_or_path PROMPTS --output_dir ./data/gen_data [--K 4 ...]

writes <output_dir>.jsonl (--output_dir is the beginning of a file's name). With more shards than GPUs, a GPU that is free takes
the next shard. Flags that are not listed below go to generation/get_hf2.py; its --help explains them. A YAML file of settings
may stand first; flags override it. Each shard logs to <output_dir>i.log. After any failure, run the same command again: it goes
on where it stopped.
"""

import argparse
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from baton import ahead, launch, program
from baton.arguments import read_yaml
from baton.errors import InputError, UnitFailed
from baton.launch import chain, gpus, plan
from baton.launch.unit import Unit
from baton.launch.words import new_parser, parse_known, positive
from baton.shards import forget_refusals
from generation import merge_data

log = logging.getLogger("baton")

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sampling:
    """What one call of this program comes to: the shards of one prompt set, and their merge."""

    shards: list[Unit]
    merge: list[str]  # the words of merge_data.py
    merged: str  # the file that it makes
    prefix: Path  # the beginning of the shards' names


def main() -> None:
    own = sampling_of(sys.argv[1:])
    if "--check" in sys.argv[1:]:
        for unit in own.shards:
            ahead.look(unit.program)
        ahead.look(own.merge)
        return
    if not all(plan.is_complete(unit.program) for unit in own.shards):
        # What follows in the same process is sampled now too: of the same model, one engine then serves both.
        following = following_sets(own)
        try:
            launch.run_chains(list(zip(own.shards, *(each.shards for each in following), strict=True)))
        except UnitFailed as failure:
            if not all(plan.is_complete(unit.program) for unit in own.shards):
                raise
            log.warning("what follows is tried again in its own turn: %s", failure)
    forget_refusals(own.prefix)  # of earlier calls: the shards are those of this one
    with ahead.command_line(own.merge):
        merge_data.main()


def following_sets(own: Sampling) -> list[Sampling]:
    """What follows at once in this process and can be sampled with this: on as many GPUs, from prompts that are there now."""
    found, outputs = [], {Path(own.merged).resolve()}
    for words in chain.following(__file__):
        named = {Path(part).resolve() for word in words for part in re.split("[,=]", word)}
        try:
            following = sampling_of(words)
        except InputError:  # its own turn says what is wrong with it
            break
        if needs(following) != needs(own) or named & outputs or any(word.startswith("--overwrite") for word in words):
            break
        found.append(following)
        outputs.add(Path(following.merged).resolve())
    return found


def needs(sampling: Sampling) -> list[int]:
    """The GPUs that each shard needs."""
    return [unit.gpus for unit in sampling.shards]


def sampling_of(words: list[str]) -> Sampling:
    """The shards that the arguments of this program come to. Raises InputError if something is missing or wrong."""
    arguments, rest = parse(words)
    size, visible = arguments.tensor_parallel_size, gpus.visible()
    slots = len(gpus.groups(visible, size)) if visible else 1
    if slots == 0:
        raise InputError(f"--tensor_parallel_size {size}, but there are {len(visible)} GPUs")
    shards = arguments.my_world_size or slots

    output = arguments.output_dir
    place = ["--my_world_size", str(shards), "--tensor_parallel_size", str(size), "--output_dir", output]
    units = [
        Unit(
            name=f"shard {index} of {shards}",
            environment="inference",
            program=(str(FOLDER / "get_hf2.py"), *rest, *place, "--local_index", str(index)),
            gpus=size if visible else 0,
            log=Path(f"{output}{index}.log"),
        )
        for index in range(shards)
    ]
    merge = ["--base_path", output, "--output_dir", f"{output}.jsonl", "--num_datasets", str(shards)]
    merge += ["--overwrite", arguments.overwrite] if arguments.overwrite else []
    merge = [str(FOLDER / "merge_data.py"), *merge]
    return Sampling(units, merge, f"{output}.jsonl", Path(output))


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this program, and the words for get_hf2.py. Raises InputError if something is missing or wrong."""
    parser = new_parser("test_gen.sh", __doc__)
    parser.add_argument("--output_dir", default="./data/gen_data", help="shard i is <output_dir>i.jsonl [%(default)s]")
    parser.add_argument("--my_world_size", type=positive, metavar="N", help="how many shards [one per GPU or group of GPUs]")
    parser.add_argument("--tensor_parallel_size", type=positive, default=1, help="GPUs that share a model [%(default)s]")
    parser.add_argument("--overwrite", nargs="?", const="true", help="sample and merge afresh where an output already exists")
    parser.add_argument("--check", action="store_true", help="say what each shard and the merge would do, and do nothing")
    parser.add_argument("--model", help="the same as --model_name_or_path")
    parser.add_argument("--prompts", help="the same as --dataset_name_or_path")
    if words and not words[0].startswith("-"):
        settings = read_yaml(Path(words[0]))
        names = ("output_dir", "my_world_size", "tensor_parallel_size", "overwrite")
        parser.set_defaults(**{name: str(settings[name]) for name in names if settings.get(name) is not None})
    arguments, rest = parse_known(parser, words)
    if any(word.partition("=")[0] == "--local_index" for word in rest):
        raise InputError("--local_index: leave it out, this program runs every shard")
    passed_on = (
        ("--model_name_or_path", arguments.model),
        ("--dataset_name_or_path", arguments.prompts),
        ("--overwrite", arguments.overwrite),
    )
    for flag, value in passed_on:
        rest += [flag, value] if value is not None else []
    if not rest:
        parser.print_usage(sys.stderr)
        raise InputError("which model, which prompts?")
    return arguments, rest


if __name__ == "__main__":
    program.run(main)
