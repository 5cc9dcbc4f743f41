"""PPO and its kin (REINFORCE++, RLOO, GRPO) on warm vLLM servers: prompts and rewards in, the next policy out.

    bash scripts/run_ppo.sh configs/ppo.yaml          # sets up what it needs, and runs this
    python ppo/run_ppo.py configs/ppo.yaml            # one process
    accelerate launch --config_file configs/zero3.yaml --num_processes 6 ppo/run_ppo.py configs/ppo.yaml --server_gpus 6,7

Each step samples `K` responses to `rollout_batch_size` prompts from the servers, has them scored, trains actor and critic, and
sends the new weights to the servers. Servers and reward server are started and ended by this program, or named by
`--vllm_url` and `--reward_url`. Every step's rollouts are in <output_dir>.rollouts/, the finished policy is in <output_dir>,
and with --save_critic the critic in <output_dir>/critic. After any failure, the same command goes on where the run stopped.
OpenRLHF's names of settings are understood where they mean the same.
"""

import logging
from pathlib import Path
from typing import Literal

from baton import program
from baton.arguments import option, parse
from baton.errors import InputError
from baton.launch.check import check_processes
from baton.online.arguments import OnlineArguments, check_online, heads_of, inputs_of, scorer_settings
from baton.sampling import changes
from baton.scorers import wanted_scorers
from baton.sources import check_start
from baton.stage import Stage
from baton.training.arguments import metrics_file
from ppo.openrlhf import own_names

log = logging.getLogger("baton")

IMPORTS = ("baton.online.start", "baton.online.finish", "ppo.algorithm")
WITH_CRITIC = "gae"


class Arguments(OnlineArguments):
    """What this program adds to what every online training has."""

    # Advantages
    advantage_estimator: Literal["gae", "reinforce++", "rloo", "grpo", "dr_grpo"] = option(
        "gae", "gae is PPO with a critic; the others need none"
    )
    gamma: float = option(1.0, "discount of a later token's reward", ge=0, le=1)
    lam: float = option(0.95, "GAE's lambda: 1 trusts the rewards, 0 the critic", ge=0, le=1)
    whiten_advantages: bool | None = option(
        None, "mean 0 and deviation 1 over all tokens of a step; default: with gae and reinforce++"
    )

    # Loss
    num_ppo_epochs: int = option(1, "passes over a step's samples", ge=1)
    ratio: Literal["token", "sequence"] = option("token", "probability ratios of tokens, or of whole responses (GSPO)")
    clip_low: float = option(0.2, "a ratio below 1 minus this is held", gt=0, lt=1)
    clip_high: float | None = option(None, "a ratio above 1 plus this is held; default: `clip_low`", gt=0)
    dual_clip: float | None = option(None, "bound on the loss of a negative advantage, as a multiple of it", gt=1)
    loss_mean: Literal["tokens", "responses", "constant"] = option(
        "tokens", "what counts alike: every token, every response, or (Dr. GRPO) every token over `max_new_tokens`"
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus", ge=0)
    correction_clip: float | None = option(
        None,
        "weigh tokens by trainer's over sampler's probability, at most this (truncated importance sampling); 2 is usual",
        gt=0,
    )
    correction_mask: list[float] | None = option(
        None, "leave out responses whose mean ratio of trainer's and sampler's probabilities is outside of these two bounds"
    )
    ptx_dataset: str | None = option(None, "demonstrations whose likelihood a further term raises", changes_result=False)
    ptx_coef: float = option(0.05, "weight of that term", ge=0)
    ptx_batch_size: int = option(16, "demonstrations of an optimizer step", ge=1)

    # KL
    kl_coef: float = option(0.01, "weight of the KL penalty to the reference; 0: no reference is loaded", ge=0)
    kl_target: float | None = option(None, "adapt the weight so that the KL of a response is about this, in nats", gt=0)
    kl_horizon: float = option(10_000, "samples over which the adapted weight changes by a fifth", gt=0)
    kl_estimator: Literal["k1", "k2", "k3"] = option("k1", "estimate of the KL of a token")
    kl_in_loss: bool = option(False, "the penalty is a term of the loss, not a part of the rewards; k2 or k3 belong there")

    # Critic
    critic_model: str | None = option(
        None,
        "the critic's starting model; default: the reward model, where it is one `bt` scorer with one output, else the policy",
        changes_result=False,
    )  # fmt: skip
    critic_learning_rate: float = option(9e-6, "of the critic", gt=0)
    value_clip: float | None = option(0.2, "a value that moves further from its old one than this is held", gt=0)
    value_coef: float = option(1.0, "weight of the critic's loss", gt=0)
    freezing_actor_steps: int = option(
        0, "first steps that train the critic alone; the actor's warm-up and schedule begin after them", ge=0
    )
    save_critic: bool = option(False, "write the critic too, to <output_dir>/critic")

    # Rewards
    reward_clip: list[float] | None = option(None, "rewards are held between these two bounds")
    normalize_reward: Literal["none", "running", "prompt"] = option(
        "none", "mean 0 and deviation 1: of all rewards so far, or of the samples of a prompt"
    )
    truncation_penalty: float = option(0.0, "subtracted from the reward of a response that was cut off by length", ge=0)
    overlong_buffer: int = option(0, "last tokens before `max_new_tokens` over which a penalty grows (DAPO)", ge=0)
    overlong_penalty: float = option(1.0, "its highest value", ge=0)
    length_penalty: float = option(0.0, "subtracted from the reward for each token", ge=0)

    metrics_path: str | None = option(None, "file of metrics; default: <output_dir>.metrics.jsonl", changes_result=False)


def check(arguments: Arguments) -> None:
    """Raise InputError for settings that make no sense together."""
    check_online(arguments)
    for name in ("reward_clip", "correction_mask"):
        bounds = getattr(arguments, name)
        if bounds is not None and (len(bounds) != 2 or not bounds[0] < bounds[1]):
            raise InputError(f"`{name}`: two numbers, the lower one first, got {bounds}")
    if arguments.K < 2 and arguments.advantage_estimator in ("rloo", "grpo", "dr_grpo"):
        raise InputError(f"`K`: {arguments.advantage_estimator} compares the samples of a prompt: at least 2")
    if arguments.kl_target is not None and not arguments.kl_coef:
        raise InputError("`kl_target` with `kl_coef: 0`: the weight adapts by factors, so it stays 0: begin with 0.01, say")
    if arguments.kl_in_loss and arguments.kl_estimator == "k1":
        raise InputError("`kl_in_loss` with `kl_estimator: k1`: its gradient is 0 on average; take k2 or k3")
    if arguments.overlong_buffer >= arguments.max_new_tokens:
        raise InputError("`overlong_buffer` must be smaller than `max_new_tokens`")
    cuts = changes({"top_p": arguments.top_p, "top_k": arguments.top_k})
    cuts += [f"min-p {arguments.min_p:g}"] * (arguments.min_p > 0)
    cuts += [f"at least {arguments.min_new_tokens} tokens"] * (arguments.min_new_tokens > 0)
    if cuts and program.rank() == 0 and not arguments.check:
        log.warning("%s: tokens are sampled from another distribution than the one that is trained", " and ".join(cuts))
    if cuts and (arguments.correction_clip or arguments.correction_mask):
        raise InputError(
            f"`correction_clip` and `correction_mask` compare the trainer with the sampler, which leaves tokens out with "
            f"{' and '.join(cuts)}: sample without, or leave the correction out"
        )
    if arguments.freezing_actor_steps and arguments.advantage_estimator != WITH_CRITIC:
        raise InputError("`freezing_actor_steps` warms the critic up, and only `advantage_estimator: gae` has one")
    if arguments.ptx_dataset and arguments.temperature != 1:
        raise InputError("`ptx_dataset`: demonstrations are learnt at temperature 1: set `temperature: 1`, or leave them out")
    if arguments.save_critic and arguments.advantage_estimator != WITH_CRITIC:
        raise InputError("`save_critic`: only `advantage_estimator: gae` has a critic")
    if critic := critic_of(arguments):
        check_start(critic)


def critic_of(arguments: Arguments) -> str | None:
    """The model that the critic starts from; None where there is no critic."""
    if arguments.advantage_estimator != WITH_CRITIC:
        return None
    scorers = wanted_scorers(arguments.scorer)
    only = scorers[0] if len(scorers) == 1 and scorers[0].kind == "bt" else None
    reward_model = only.target if only and not heads_of(arguments) else None
    return arguments.critic_model or reward_model or arguments.model_name_or_path


def updates_of_step(arguments: Arguments) -> int:
    """Optimizer steps on the samples of one step."""
    prompts = arguments.rollout_batch_size
    return arguments.num_ppo_epochs * (prompts // (arguments.prompts_per_update or prompts))


def all_inputs(arguments: Arguments) -> dict[str, str | Path]:
    """What the run reads, by name, for the manifest."""
    more = {"critic": critic_of(arguments), "demonstrations": arguments.ptx_dataset}
    return inputs_of(arguments) | {name: source for name, source in more.items() if source}


def main() -> None:
    arguments = parse(Arguments, __doc__, accept=own_names)
    if arguments.whiten_advantages is None:
        arguments.whiten_advantages = arguments.advantage_estimator in ("gae", "reinforce++")
    check(arguments)
    output, critic = Path(arguments.output_dir), critic_of(arguments)
    stage = Stage.begin("ppo", arguments, output, all_inputs(arguments), scorer_settings(arguments))
    if stage is None:
        return
    check_processes()

    from baton.online.finish import finish
    from baton.online.start import Start
    from baton.online.trouble import Trouble
    from ppo.algorithm import Algorithm

    start = Start(arguments, stage, metrics_file(output, arguments.metrics_path), critic)
    per_step = updates_of_step(arguments)
    with start.engines() as engines:
        learner = start.learner(
            critic,
            total_updates=start.steps * per_step,
            frozen_updates=arguments.freezing_actor_steps * per_step,
            critic_learning_rate=arguments.critic_learning_rate,
        )
        uses_reference = arguments.kl_coef > 0 or arguments.kl_target is not None
        reference = start.reference() if uses_reference else None
        algorithm = Algorithm(arguments, learner, reference, start.demonstrations(arguments.ptx_dataset))
        metrics = start.loop(learner, algorithm, engines, Trouble()).run()
    kept = critic if arguments.save_critic else None
    finish(arguments, learner, stage, start.tokenizer, start.prompts, start.drops, metrics, kept)


if __name__ == "__main__":
    program.run(main)
