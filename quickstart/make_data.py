"""Write the quickstart's data: demonstrations, reward-model pairs, a prompt file for each round, and held-out prompts.

    python quickstart/make_data.py --output_dir data --seed 0

    sft.jsonl                      {"prompt", "response"}            demonstrations, as often favourable as not
    rm_train.jsonl rm_test.jsonl   {"prompt", "chosen", "rejected"}  labelled by the gold score, with Bradley-Terry noise
    prompts_round1.jsonl …         {"prompt"}                        a file for each round
    heldout.jsonl                  {"prompt"}                        for evaluation alone

No prompt occurs twice, in one file or in two. The same arguments give the same bytes.
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import gold
import grammar
from baton import jsonl, program
from baton.arguments import StageArguments, option, parse
from baton.jsonl import Record
from baton.stage import Stage

LABEL_SHARPNESS = 8.0  # a labeller prefers the response that is better by d with probability sigmoid(8 d)

Opening = tuple[str, dict[str, str]]


class Arguments(StageArguments):
    output_dir: Path = option(..., "folder to write; it is made new", changes_result=False)
    seed: int = option(0, "seed of everything that is drawn")
    demonstrations: int = option(8000, "examples in sft.jsonl", ge=1)
    train_pairs: int = option(3000, "pairs in rm_train.jsonl", ge=1)
    test_pairs: int = option(400, "pairs in rm_test.jsonl", ge=1)
    rounds: int = option(3, "how many prompt files for training rounds", ge=1)
    prompts_per_round: int = option(384, "prompts in each of them", ge=1)
    heldout_prompts: int = option(200, "prompts in heldout.jsonl", ge=1)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    sources = {"grammar": grammar.__file__, "gold score": gold.__file__}
    stage = Stage.begin("make_data", arguments, arguments.output_dir, sources)
    if stage is None:
        return
    stage.partial_folder.mkdir(exist_ok=True)
    counts = {name: jsonl.write(stage.partial_folder / name, records) for name, records in make_data(arguments).items()}
    stage.finish(records_in=sum(counts.values()), records_out=sum(counts.values()), files=counts)


def make_data(arguments: Arguments) -> dict[str, Iterator[Record]]:
    """The records of each file, drawn as they are read; to be read in the order of the files."""
    rng = Random(arguments.seed)
    openings = distinct_openings(rng)
    files = {"heldout.jsonl": (_prompt(text) for text, _ in islice(openings, arguments.heldout_prompts))}
    for number in range(1, arguments.rounds + 1):
        files[f"prompts_round{number}.jsonl"] = (_prompt(text) for text, _ in islice(openings, arguments.prompts_per_round))
    files["rm_test.jsonl"] = (pair(rng, opening) for opening in islice(openings, arguments.test_pairs))
    files["rm_train.jsonl"] = (pair(rng, opening) for opening in islice(openings, arguments.train_pairs))
    files["sft.jsonl"] = (demonstration(rng, opening) for opening in islice(openings, arguments.demonstrations))
    return files


def distinct_openings(rng: Random) -> Iterator[Opening]:
    """Openings without end, none of them twice."""
    seen = set()
    while True:
        text, names = grammar.opening(rng)
        if text not in seen:
            seen.add(text)
            yield text, names


def demonstration(rng: Random, opening: Opening) -> Record:
    """A prompt with a response of a random mood."""
    text, names = opening
    return _prompt(text) | {"response": grammar.continuation(rng, names)}


def pair(rng: Random, opening: Opening) -> Record:
    """Two responses to a prompt, labelled by a noisy judge: P(a is chosen) = sigmoid(sharpness · (gold(a) - gold(b)))."""
    text, names = opening
    while True:
        a, b = grammar.continuation(rng, names), grammar.continuation(rng, names)
        difference = gold.gold_score(text, a) - gold.gold_score(text, b)
        if difference:
            break
    if rng.random() > 1 / (1 + math.exp(-LABEL_SHARPNESS * difference)):
        a, b = b, a
    return _prompt(text) | {"chosen": a, "rejected": b}


def _prompt(text: str) -> Record:
    return {"prompt": [{"role": "user", "content": text}]}


if __name__ == "__main__":
    program.run(main)
