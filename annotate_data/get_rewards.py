"""Annotate sampled responses with rewards.

    # one GPU, or the CPU
    python annotate_data/get_rewards.py --dataset_name_or_path data/gen_data.jsonl \\
        --output_dir data/data_with_rewards.jsonl --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1
    # eight GPUs
    accelerate launch --num_processes 8 annotate_data/get_rewards.py --dataset_name_or_path …
    # two CPU processes (accelerate launch --cpu would start one)
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 annotate_data/get_rewards.py …
    # another scorer, or several at once
    … --scorer function:docs/examples/gsm8k_reward.py:gsm8k_reward
    … --scorer bt:sfairXC/FsfairX-LLaMA3-RM-v0.1 brief=function:rules.py:brevity --weights 1 0.2

Kinds of scorers: bt:MODEL, vllm:MODEL, pair:MODEL, process:MODEL, custom:MODEL, function:FILE.py:NAME, http:URL[,URL…],
judge:URL[,URL…]; a name may stand before: NAME=KIND:TARGET. With several, `rewards` is the weighted sum and `rewards_by` holds
each.

Each record of the output is the input's, with `id` and `rewards`, in the order of the input; <output>.summary.json beside it
says what the rewards look like.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from annotate_data import scorers
from annotate_data.kept import kept
from annotate_data.plot import draw, plot_path
from annotate_data.scorer_arguments import ScorerArguments, weighted_sum, weights_of
from annotate_data.work import Responses, Scorer, check_output
from baton.ahead import will_be_made
from baton.arguments import option, parse
from baton.errors import FailuresListed
from baton.jsonl import Record
from baton.launch.check import check_processes
from baton.program import rank, run
from baton.scorers import KINDS_ON_GPU, identity
from baton.sources import check_hub, check_hub_ahead, template_input
from baton.stage import Stage

# What a scorer that is a model takes; see baton/launch/chain.py.
IMPORTS = ("annotate_data.annotate", "annotate_data.bradley_terry", "transformers.models.auto.modeling_auto")


class Arguments(ScorerArguments):
    dataset_name_or_path: str = option(..., "responses to score: a file or a Hugging Face dataset", changes_result=False)
    output_dir: Path = option(..., "the output FILE, such as data/data_with_rewards.jsonl", changes_result=False)
    dataset_key: str | None = option(None, "key of the prompt (else `prompt` or `context_messages`)")
    K: int | None = option(None, "responses of each prompt, checked when given", ge=1, changes_result=False)
    unanswered: Literal["fail", "drop"] = option(
        "fail",
        "responses whose calls timed out or failed. fail: write no output, the same command asks for them again. drop: leave "
        "their records out",
        changes_result=False,
    )
    api_key: SecretStr | None = option(None, "for http and judge (default: $OPENAI_API_KEY)", changes_result=False)
    plot: bool = option(False, "write <output>.png: rewards, and reward against length", changes_result=False)

    def key(self) -> str | None:
        """The API key, from the arguments or the environment."""
        return self.api_key.get_secret_value() if self.api_key else os.environ.get("OPENAI_API_KEY")


def main() -> None:
    arguments = parse(Arguments, __doc__)
    check_output(arguments.output_dir)
    wanted = arguments.wanted()
    check_processes(on_cpu=arguments.device == "cpu" or not any(scorer.kind in KINDS_ON_GPU for scorer in wanted))
    weights = weights_of(wanted, arguments.weights)
    inputs: dict[str, str | Path] = {"dataset": arguments.dataset_name_or_path, **template_input(arguments.chat_template)}
    for scorer in wanted:
        inputs |= scorers.check(scorer, arguments)
    settings = {"scorers": [identity(scorer) for scorer in wanted]}

    def read_responses() -> Responses:
        responses = Responses(arguments.dataset_name_or_path, arguments.dataset_key, arguments.K)
        if any(scorer.kind == "pair" for scorer in wanted):
            responses.require_two()
        return responses

    check = None if will_be_made(arguments.dataset_name_or_path) else lambda stage: read_responses()
    stage = Stage.begin("annotate", arguments, arguments.output_dir, inputs, settings, check=check)
    models = [scorer.target for scorer in wanted if scorer.kind in KINDS_ON_GPU]
    if stage is None:
        for model in models:
            check_hub_ahead(model, arguments.output_dir)
        if arguments.plot and not arguments.check and rank() == 0 and not plot_path(arguments.output_dir).exists():
            draw(arguments.output_dir)
        return
    for model in models:
        check_hub(model)
    responses = read_responses()

    def add_rewards(record: Record, scores: dict[str, list[float]]) -> tuple[Record, dict[str, list[float]]]:
        """The record with its rewards, and what to summarise."""
        rewards = weighted_sum(scores, weights)
        if len(scores) == 1:
            return {**record, "rewards": rewards}, {"rewards": rewards}
        return {**record, "rewards": rewards, "rewards_by": scores}, {"rewards": rewards, **scores}

    from annotate_data.annotate import annotate

    makers = {scorer.name: maker(scorer, arguments) for scorer in wanted}
    drops = annotate(stage, responses, makers, add_rewards, drop_unanswered=arguments.unanswered == "drop")
    if arguments.plot and rank() == 0:
        draw(arguments.output_dir)
    if drops.counts:
        raise FailuresListed(f"{drops.counts.total()} records have no rewards ({drops}); the manifest names {drops.named()}")


def maker(scorer: scorers.Wanted, arguments: Arguments) -> Callable[[], Scorer]:
    """A function that makes the scorer, or gives the one that an earlier stage in this process has made."""
    make = scorers.maker(scorer, arguments)
    if scorer.kind not in scorers.IN_PROCESS:
        return make
    return kept(scorer.kind, scorer.target, arguments.model_settings(), arguments.device, make)


if __name__ == "__main__":
    run(main)
