"""Write the data: demonstrations, the reward model's pairs, a prompt file for each round, held-out prompts.

    python quickstart/make_data.py --output_dir data --seed 0

    sft.jsonl                     {"prompt", "response"}            demonstrations, as often favourable as not
    rm_train.jsonl rm_test.jsonl  {"prompt", "chosen", "rejected"}  labelled by the gold score, with noise
    prompts_round1.jsonl …        {"prompt"}                        a file for each round
    heldout.jsonl                 {"prompt"}                        for evaluation alone

No prompt occurs twice, in one file or in two. The same arguments give the same bytes.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

from baton import jsonl, program
from baton.arguments import StageArguments, option, parse
from baton.jsonl import Record
from baton.stage import Stage
from quickstart import gold, grammar

RESPONSES_COMPARED = 4  # a pair is the best and the worst of so many
LABEL_SHARPNESS = 5.0  # the judge picks the response that is better by d with probability sigmoid(5 d)

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
    files = make_data(arguments)
    counts = {name: jsonl.write(stage.partial_folder / name, records) for name, records in files.items()}
    stage.finish(records_in=sum(counts.values()), records_out=sum(counts.values()), files=counts)


def make_data(arguments: Arguments) -> dict[str, Iterator[Record]]:
    """The records of each file, drawn as they are read; to be read in the order of the files."""
    rng = Random(arguments.seed)
    openings = distinct_openings(rng)

    def draw(count: int, make: Callable[[Random, Opening], Record]) -> Iterator[Record]:
        return (make(rng, opening) for opening in islice(openings, count))

    rounds = range(1, arguments.rounds + 1)
    return {
        "heldout.jsonl": draw(arguments.heldout_prompts, prompt),
        **{f"prompts_round{number}.jsonl": draw(arguments.prompts_per_round, prompt) for number in rounds},
        "rm_test.jsonl": draw(arguments.test_pairs, pair),
        "rm_train.jsonl": draw(arguments.train_pairs, pair),
        "sft.jsonl": draw(arguments.demonstrations, demonstration),
    }


def distinct_openings(rng: Random) -> Iterator[Opening]:
    """Openings without end, none of them twice."""
    seen = set()
    while True:
        text, names = grammar.opening(rng)
        if text not in seen:
            seen.add(text)
            yield text, names


def prompt(rng: Random, opening: Opening) -> Record:
    """A prompt alone."""
    return {"prompt": [{"role": "user", "content": opening[0]}]}


def demonstration(rng: Random, opening: Opening) -> Record:
    """A prompt with a response of a random mood."""
    _, names = opening
    return prompt(rng, opening) | {"response": grammar.continuation(rng, names)}


def pair(rng: Random, opening: Opening) -> Record:
    """The best and the worst of some responses by gold score, in the order of a Bradley-Terry judge.

    The judge is not always right: P(the better one is chosen) = sigmoid(sharpness · difference of gold scores).
    """
    text, names = opening
    drawn = [grammar.continuation(rng, names) for _ in range(RESPONSES_COMPARED)]
    scores = [gold.gold_score(text, response) for response in drawn]
    chosen, rejected = drawn[scores.index(max(scores))], drawn[scores.index(min(scores))]
    if rng.random() > 1 / (1 + math.exp(-LABEL_SHARPNESS * (max(scores) - min(scores)))):
        chosen, rejected = rejected, chosen
    return prompt(rng, opening) | {"chosen": chosen, "rejected": rejected}


if __name__ == "__main__":
    program.run(main)
