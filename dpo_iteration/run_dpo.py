"""One round of DPO: annotated responses (or offline preferences) in, pairs and the next policy out.

    python dpo_iteration/run_dpo.py configs/training.yaml                                             # one process
    accelerate launch --config_file configs/zero2.yaml dpo_iteration/run_dpo.py configs/training.yaml # eight GPUs

Several input files may be mixed, and the pairs of earlier rounds (`history`); <pairs_path> holds this round's own alone.
Every field of TRL's DPOConfig is accepted in the YAML file and as a flag (`beta`, `loss_type`, `label_smoothing`, …). The
reference policy's log-probabilities are computed once, before the policy is loaded, and kept beside the output. With `eval_dir`
or `eval_every` the policy is evaluated on other pairs, at `eval_steps` and at the end. The names of Online-RLHF's files are
understood. With `--use_peft` an adapter is trained; `--merge_adapter` writes it merged into the policy, as the next round needs
it.
"""

import logging
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from baton import jsonl, program
from baton.ahead import check_there, note_adapter
from baton.arguments import option
from baton.errors import InputError
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer
from baton.prompts import source_inputs
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.training.adapters import LoraArguments, check_lora
from baton.training.arguments import (
    Compile,
    compile_option,
    early_stopping_option,
    keep_checkpoints_option,
    metrics_file,
    parse_training,
    tokens_per_row_option,
)
from baton.training.data import DataArguments, dataset_probs
from baton.training.held_out import NONE
from baton.training.reports import check_outside, place_reports
from dpo_iteration.account import IN, Account, in_words
from dpo_iteration.choose import NO_MARGIN, earlier_pairs
from dpo_iteration.losses import check_loss_types, is_reference_free, loss_numbers, loss_types, split_that_decides
from dpo_iteration.online_rlhf import own_names
from dpo_iteration.pair_arguments import PairArguments, pair_settings
from dpo_iteration.pair_rows import (
    HELD_OUT_PAIRS,
    check_evaluation,
    check_margins,
    held_out_every,
    held_out_rows,
    held_out_source,
    prompts_aside,
    rows_of,
    write_chosen,
)
from dpo_iteration.rows import check_lengths, log_rows
from dpo_iteration.xpo import check_sides

log = logging.getLogger("baton")

IMPORTS = ("dpo_iteration.load", "dpo_iteration.finish")


class Arguments(DataArguments, PairArguments, LoraArguments):
    """What this program adds to DPOConfig."""

    model_name_or_path: str = option(..., "the policy that this round starts from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ...,
        "annotated responses (`prompt`, `responses`, `rewards`), preferences (`chosen`, `rejected`) or Baton's own pairs: "
        "a .jsonl, .jsonl.gz, .json or .parquet file, or a Hugging Face dataset; several with commas between; `train_dir` too",
        changes_result=False,
    )
    chosen_key: str | None = option(None, "key of the better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of the worse response, if it is not `rejected`")
    score_key: str | None = option(None, "key of the score of a response in data sets such as UltraFeedback (docs/data.md)")
    history: int = option(0, "train also on the pairs of so many earlier rounds; needs folders round1, round2, …", ge=0)
    eval_dir: str | None = option(
        None,
        f"evaluate on the first {HELD_OUT_PAIRS} pairs of this file or dataset, of annotated responses two random ones, at "
        "`eval_steps` and at the end",
        changes_result=False,
    )
    eval_every: int | None = option(
        None, "hold out one prompt in so many where no `eval_dir` is given, and evaluate on all pairs of these prompts", ge=2
    )
    max_training_samples: int = option(
        -1,
        "train on the first so many pairs of the data; -1: on all. With `dataset_probs`: draw so many records, held-out ones "
        "among them, of which some may make no pair or several",
        ge=-1,
    )
    output_dir: str = option(
        ..., "folder of the finished policy (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    pairs_path: str | None = option(None, "file for the chosen pairs; default: <output_dir>.pairs.jsonl", changes_result=False)
    min_edit_distance: float = option(
        0.0, "least edit distance of a pair's texts, as a share of the longer one's characters", ge=0, le=1
    )
    extra_responses: str | None = option(
        None,
        "annotated responses of another model, or the data set's own, to the same prompts (joined by `id`): pairs are chosen "
        "among them and those of the data; with `xpo_alpha` those of the reference",
        changes_result=False,
    )
    margin_scale: float = option(0.0, "weight of the reward margin as an offset in the sigmoid loss", ge=0)
    length_alpha: float = option(0.0, "what a token of difference in length counts in the sigmoid loss, in nats", ge=0)
    xpo_alpha: float = option(
        0.0,
        "XPO: so many times the policy's log-probability of the reference's response, in nats, is added to the sigmoid loss; a "
        "pair is a random response of the data and a random one of `extra_responses`",
        ge=0,
    )
    simpo_gamma: float = option(0.5, "loss_type simpo: margin that chosen keeps from rejected, in nats, after beta", ge=0)
    orpo_lambda: float = option(0.1, "loss_type orpo: weight of the odds ratio beside the likelihood of the chosen", ge=0)
    dpop_lambda: float = option(50.0, "loss_type dpop: weight of what the chosen lost against the reference", ge=0)
    rebel_eta: float = option(1.0, "loss_type rebel: nats of log-ratio that a unit of reward comes to", gt=0)
    max_length: int = option(2048, "longest prompt and response together, in tokens; responses are cut to fit", ge=2)
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    seed: int = option(42, "seed of the training and of random pairs")
    forward: Literal["packed", "trl"] = option("packed", "packed rows that share prefixes, or TRL's own padded batches")
    tokens_per_row: int = tokens_per_row_option("pair")
    compile: Compile = compile_option()
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def config_class() -> type:
    from trl import DPOConfig

    return DPOConfig


def check(arguments: Arguments, settings: dict[str, Any]) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    pair_settings(arguments)
    check_loss_types(settings, loss_numbers(arguments))
    if arguments.xpo_alpha and arguments.extra_responses and arguments.choose_type != "random":
        raise InputError(
            f"`xpo_alpha` compares random responses of policy and reference, and `choose_type` {arguments.choose_type} others: "
            "set `choose_type: random`"
        )
    check_lengths(arguments.max_prompt_length, arguments.max_length)
    check_lora(arguments)
    for model in models_of(arguments, settings).values():
        check_start(model)
    dataset_probs(arguments)
    source = check_evaluation(arguments, settings)
    if source:
        check_there(source, "held-out data")
    if arguments.extra_responses:
        check_there(arguments.extra_responses, "extra responses")


def models_of(arguments: Arguments, settings: dict[str, Any]) -> dict[str, str]:
    """The starting policy, `model`, and where the loss has one the `reference`."""
    policy = {"model": arguments.model_name_or_path}
    if is_reference_free(map(str, loss_types(settings))):
        return policy
    return policy | {"reference": arguments.ref_model or arguments.model_name_or_path}


def inputs_of(
    arguments: Arguments, models: dict[str, str], held_out: str | None, pairs_path: Path, metrics_path: Path,
    earlier: list[Path],
) -> dict[str, str | Path]:  # fmt: skip
    """What the run reads, its `models` among it, by name, for the manifest.

    Raises InputError where a file that it writes would replace one.
    """
    inputs: dict[str, str | Path] = {**models}
    inputs |= source_inputs("data", arguments.dataset_name_or_path) | template_input(arguments.chat_template)
    inputs |= {"held-out data": held_out} if held_out else {}
    inputs |= {"extra responses": arguments.extra_responses} if arguments.extra_responses else {}
    refuse_input(pairs_path, inputs, "--pairs_path", arguments.output_dir)
    refuse_input(metrics_path, inputs | {"pairs_path": pairs_path}, "--metrics_path", arguments.output_dir)
    return inputs | {f"pairs of {path.parent.name}": path for path in earlier}


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's DPOConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, list(models_of(arguments, settings).values()), ahead=arguments.check)
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of
    from dpo_iteration.checks import check_training
    from dpo_iteration.margin import check_offset
    from dpo_iteration.own_losses import check_own_losses

    settings = settings | {"max_length": arguments.max_length, "seed": arguments.seed}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage, adapter, kept)
    check_training(arguments, config, sharding_of(config))
    for name in ("margin_scale", "length_alpha", "xpo_alpha"):
        check_offset(config, name, getattr(arguments, name))
    check_own_losses(config, loss_numbers(arguments), arguments.margin_scale)
    return config


def main() -> None:
    arguments, settings = parse_training("dpo_iteration/run_dpo.py", Arguments, __doc__, config_class, rewrite=own_names)
    check(arguments, settings)
    output = Path(arguments.output_dir)
    pairs_path = Path(arguments.pairs_path or f"{output}.pairs.jsonl")
    metrics_path = metrics_file(output, arguments.metrics_path)
    earlier = earlier_pairs(pairs_path, arguments.history)
    source, every = held_out_source(arguments, settings), held_out_every(arguments, settings)
    models = models_of(arguments, settings)
    inputs = inputs_of(arguments, models, source, pairs_path, metrics_path, earlier)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    # Without an evaluation what `eval_every` would hold out is trained on.
    held_out = {"held_out_every": every} if every else {}
    deciding = settings | held_out | split_that_decides(settings, arguments.forward == "packed")
    stage = Stage.begin("dpo", arguments, output, inputs, deciding, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import train
    from baton.training.config import log_training
    from dpo_iteration.finish import finish
    from dpo_iteration.load import make_trainer

    aside, chosen = NONE, Account()
    if program.rank() == 0:  # with the process group there, or another machine would not notice that this fails
        aside = prompts_aside(arguments, every)
        chosen = write_chosen(arguments, pairs_path, aside)
    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    dataset, account = rows_of(arguments, pairs_path, earlier, aside, chosen, tokenizer, config)
    held_out, held_out_account = None, Account()
    if source or every:
        held_out, held_out_account = held_out_rows(arguments, source, aside, tokenizer, config)
    if program.rank() == 0:
        log_rows(dataset, tokenizer, account.drops, account.counted)
        without = account.counted[NO_MARGIN] + held_out_account.counted[NO_MARGIN]
        check_margins(without, arguments.margin_scale, config.loss_type)
        if arguments.xpo_alpha:
            check_sides(dataset)
    place_reports(settings, metrics_path)
    with loading(*models.values()):
        trainer = make_trainer(arguments, config, tokenizer, dataset, held_out, models.get("reference"), pairs_path.parent)
    log_training(trainer)
    counts = {"in": account.counted[IN], "out": len(dataset), "dropped": dict(account.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() == 0:
        log.info("pairs: %s", in_words(account.counted))
        where, first = next(chain(jsonl.read(pairs_path), *map(jsonl.read, earlier)))
        learnt = [*first["prompt"], {"role": "assistant", "content": first["chosen"]}], where
        finish(trainer, stage, arguments, learnt, account, held_out_account, metrics, pairs=account.facts)


if __name__ == "__main__":
    program.run(main)
