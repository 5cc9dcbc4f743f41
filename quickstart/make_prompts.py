"""Write prompts for a real chat model: requests for a short review of a film that does not exist.

    python quickstart/make_prompts.py --output_dir prompts --seed 0

    heldout.jsonl                 {"prompt"}    for evaluation alone
    reward_model.jsonl            {"prompt"}    whose responses the reward model is trained on
    round1.jsonl …                {"prompt"}    a file for each round

No prompt occurs twice, in one file or in two. The same arguments give the same bytes.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from baton import jsonl, program
from baton.arguments import StageArguments, option, parse
from baton.stage import Stage
from quickstart import grammar

REQUESTS = (
    "Write an honest review of {film}, in two sentences. Comment on {angle}.",
    "What do you think of {film}? Answer in two sentences, and mention {angle}.",
    "Say in two sentences whether one should see {film}, and what you make of {angle}.",
    "You have just seen {film}. Tell a friend in two sentences how it was, and how {angle} was.",
)
FILM = '"{title}", a {genre} about a {role}'
ANGLES = (
    *("the acting", "the music", "the pace", "the ending", "the camera work", "the dialogue", "the humour"),
    *("the opening", "the set design", "the plot", "the editing", "the last act", "the mood", "the sound"),
)


class Arguments(StageArguments):
    output_dir: Path = option(..., "folder to write; it is made new", changes_result=False)
    seed: int = option(0, "seed of everything that is drawn")
    rounds: int = option(3, "how many prompt files for training rounds", ge=1)
    prompts_per_round: int = option(64, "prompts in each of them", ge=1)
    reward_model_prompts: int = option(256, "prompts in reward_model.jsonl", ge=1)
    heldout_prompts: int = option(64, "prompts in heldout.jsonl", ge=1)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    stage = Stage.begin("make_prompts", arguments, arguments.output_dir, {"grammar": grammar.__file__, "requests": __file__})
    if stage is None:
        return
    stage.partial_folder.mkdir(exist_ok=True)
    requests = distinct_requests(Random(arguments.seed))
    counts = {}
    for name, count in sizes(arguments).items():
        records = ({"prompt": [{"role": "user", "content": text}]} for text in islice(requests, count))
        counts[name] = jsonl.write(stage.partial_folder / name, records)
    stage.finish(records_in=sum(counts.values()), records_out=sum(counts.values()), files=counts)


def sizes(arguments: Arguments) -> dict[str, int]:
    """How many prompts each file gets. Another number of rounds, the last files, leaves the other files as they are."""
    rounds = range(1, arguments.rounds + 1)
    return {
        "heldout.jsonl": arguments.heldout_prompts,
        "reward_model.jsonl": arguments.reward_model_prompts,
        **{f"round{number}.jsonl": arguments.prompts_per_round for number in rounds},
    }


def distinct_requests(rng: Random) -> Iterator[str]:
    """Requests without end, none of them twice."""
    seen = set()
    while True:
        text = request(rng)
        if text not in seen:
            seen.add(text)
            yield text


def request(rng: Random) -> str:
    """A random request: a way to ask, a film, and what to speak of."""
    used: set[str] = set()
    words = {name: grammar.expand(name, rng, {}, used) for name in ("title", "genre", "role")}
    return rng.choice(REQUESTS).format(film=FILM.format(**words), angle=rng.choice(ANGLES))


if __name__ == "__main__":
    program.run(main)
