"""Semi-online DPO on warm vLLM servers: many small rounds of sampling, scoring, pairs and an optimizer step or a few.

    python dpo_iteration/run_online_dpo.py configs/quickstart/online_dpo.yaml --model_name_or_path … --output_dir …
    accelerate launch --config_file configs/zero2.yaml --num_processes 4 \\
        dpo_iteration/run_online_dpo.py … --server_gpus 4,5,6,7

Where `run_dpo.py` trains on one large file of responses, this program samples `K` responses to `rollout_batch_size` prompts,
has them scored, trains on their pairs, and sends the new weights to the servers, step after step. Pairs are chosen as in
`run_dpo.py`. Servers, rollouts and what happens after a failure are as in `ppo/run_ppo.py`.
"""

from pathlib import Path
from typing import Literal

from baton import program
from baton.arguments import option, parse
from baton.errors import InputError
from baton.launch.check import check_processes
from baton.online.arguments import OnlineArguments, check_online, inputs_of, scorer_settings
from baton.pairs import PairSettings
from baton.stage import Stage
from baton.training.arguments import metrics_file
from dpo_iteration.pair_arguments import PairArguments, pair_settings

IMPORTS = ("baton.online.start", "baton.online.finish", "dpo_iteration.online")


class Arguments(PairArguments, OnlineArguments):
    """What this program adds to what every online training has."""

    beta: float = option(0.1, "weight of the log-ratios in the loss", gt=0)
    loss_type: Literal["sigmoid", "ipo", "hinge"] = option("sigmoid", "loss of a pair")
    nll_coef: float = option(0.0, "weight of the chosen responses' negative log-likelihood (RPO)", ge=0)
    pairs_per_update: int | None = option(None, "pairs of an optimizer step; default: all of the step", ge=1)
    metrics_path: str | None = option(None, "file of metrics; default: <output_dir>.metrics.jsonl", changes_result=False)


def check(arguments: Arguments) -> PairSettings:
    """How pairs are chosen. Raises InputError for settings that make no sense together."""
    check_online(arguments)
    if arguments.K < 2:
        raise InputError("`K`: a pair needs at least 2 responses to a prompt")
    if arguments.prompts_per_update:
        raise InputError("`prompts_per_update`: here `pairs_per_update` says what an optimizer step takes")
    return pair_settings(arguments)


def main() -> None:
    arguments = parse(Arguments, __doc__)
    pairs = check(arguments)
    output = Path(arguments.output_dir)
    stage = Stage.begin("online_dpo", arguments, output, inputs_of(arguments), scorer_settings(arguments))
    if stage is None:
        return
    check_processes()

    from baton.online.finish import finish
    from baton.online.start import Start
    from baton.online.trouble import Trouble
    from dpo_iteration.online import OnlineDPO

    start = Start(arguments, stage, metrics_file(output, arguments.metrics_path))
    most = arguments.rollout_batch_size * pairs.pairs_per_prompt
    updates = -(-most // (arguments.pairs_per_update or most))
    with start.engines() as engines:
        learner = start.learner(total_updates=start.steps * updates)
        algorithm = OnlineDPO(arguments, pairs, learner, start.reference())
        metrics = start.loop(learner, algorithm, engines, Trouble()).run()
    finish(arguments, learner, stage, start.tokenizer, start.prompts, start.drops, metrics)


if __name__ == "__main__":
    program.run(main)
