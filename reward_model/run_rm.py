"""Train a reward model on TRL's RewardTrainer with packed rows: from preference pairs, from rewards, or from labelled steps.

    python reward_model/run_rm.py configs/rm.yaml                                                     # one process
    accelerate launch --config_file configs/zero2.yaml reward_model/run_rm.py configs/rm.yaml         # eight GPUs

Pairs are {"prompt", "chosen", "rejected"} in any of the common shapes. Chosen and rejected share their prompt, which is
computed once. The loss is -log sigmoid(r_chosen - r_rejected) (Bradley and Terry, 1952; Ouyang et al., 2022, arXiv 2203.02155,
equation 1), with the pair's margin subtracted from the difference if --margin_scale says so. The held-out accuracy with its
interval, by margin too, the calibration, and the mean rewards of chosen and rejected responses go into the manifest.

--loss_type regression learns the `rewards` of `responses` themselves, with one output or several (--heads), and --loss_type
process which steps of a response are right: {"prompt", "completions": [step], "labels": [true or false]}.

Every field of TRL's RewardConfig is accepted too.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any, Literal

from baton import program
from baton.ahead import note_adapter
from baton.arguments import option
from baton.errors import InputError
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer
from baton.prompts import source_inputs
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.steps import OUTPUT, separator_of
from baton.task import spelling
from baton.training.adapters import LoraArguments, check_lora, merge_adapter
from baton.training.arguments import (
    Compile,
    compile_option,
    early_stopping_option,
    keep_checkpoints_option,
    metrics_file,
    parse_training,
    tokens_per_row_option,
)
from baton.training.data import DataArguments, dataset_probs, warn_of_trained_on
from baton.training.reports import check_outside, place_reports
from reward_model.pairs import count_pairs, held_out_pairs, training_pairs
from reward_model.quality import log_quality, log_scores, quality
from reward_model.rows import rows_of

log = logging.getLogger("baton")

# Settings that only some values of `loss_type` read.
ONLY_WITH = {
    "heads": ("regression",),
    "step_separator": ("process",),
    "score_key": ("bradley_terry", "regression"),
    **dict.fromkeys(("chosen_key", "rejected_key", "max_pairs_per_prompt", "loss", "margin_scale"), ("bradley_terry",)),
    **dict.fromkeys(("router_aux_loss_coef", "center_rewards_coefficient"), ("bradley_terry",)),  # the last is TRL's
}
# Settings of RewardConfig that TRL's loss does not read, and whose noise would be that of a packed row as one long text.
NOT_HERE = ("label_smoothing_factor", "neftune_noise_alpha")

IMPORTS = ("reward_model.trainer", "baton.training.checkpoints", "baton.training.rows")


class Arguments(DataArguments, LoraArguments):
    """What this program adds to RewardConfig."""

    model_name_or_path: str = option(..., "the model to start from: a folder or a Hugging Face name", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "what to train on, preference pairs; several files or datasets with commas between", changes_result=False
    )
    loss_type: Literal["bradley_terry", "regression", "process"] = option(
        "bradley_terry",
        "bradley_terry learns which response of a pair is better; regression: the rewards of responses, by their mean squared "
        "error, in units of the reward; process: which steps of a response are right, by binary cross-entropy",
    )
    heads: list[str] | None = option(
        None, "for regression: names of rewards in `rewards_by`, or columns of a data set such as HelpSteer; an output for each"
    )
    step_separator: str | None = option(
        None, "for process: what stands between steps; \\n is a line break (default: an empty line, \\n\\n)"
    )
    chosen_key: str | None = option(None, "key of the better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of the worse response, if it is not `rejected`")
    score_key: str | None = option(None, "key of the score of a response in data sets such as UltraFeedback (docs/data.md)")
    max_samples: int | None = option(None, "use only the first N records of the training pairs", ge=1)
    max_pairs_per_prompt: int | None = option(
        None, "most pairs of a record with several answers; default: all of ReaL's, one of scored responses", ge=1
    )
    eval_dataset_name_or_path: str | None = option(
        None, "held-out pairs; default: one in `eval_every` of the training pairs", changes_result=False
    )
    eval_dataset_split: str = option("test", "split of a held-out Hugging Face dataset")
    eval_every: int = option(20, "hold out one prompt in so many where no held-out file is given", ge=2)
    output_dir: str = option(
        ...,
        "folder of the finished reward model (in generation/ and annotate_data/ this flag names a file)",
        changes_result=False,
    )
    loss: Literal["log_sig", "log_exp"] = option(
        "log_sig",
        "ColossalChat's two names for one formula, which is written twice there: -log sigmoid(d) = log(1 + exp(-d))",
        changes_result=False,
    )
    margin_scale: float = option(
        0.0,
        "the loss takes so many times a pair's margin from the difference of its rewards; 1: as TRL does with a `margin`. The "
        "margin is `margin`, or `chosen_reward` minus `rejected_reward`",
        ge=0,
    )
    head_init: Literal["default", "normal"] = option(
        "default",
        "what the score head starts from: normal: N(0, 1 / (d + 1)) of the hidden size d, default: the model's own "
        "initialisation, or its head if it has one",
    )
    router_aux_loss_coef: float = option(
        0.0, "weight of the loss that balances the router of a mixture of experts; 0: without", ge=0
    )
    max_length: int = option(2048, "longest conversation, in tokens; pairs with a longer one are dropped and counted", ge=2)
    tokens_per_row: int = tokens_per_row_option("pair")
    compile: Compile = compile_option()
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def config_class() -> type:
    from trl import RewardConfig

    return RewardConfig


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's RewardConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, [arguments.model_name_or_path], ahead=arguments.check)
    from baton.training.checks import check_kept, check_order, check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of

    settings = settings | {"max_length": arguments.max_length}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage, adapter, kept)
    check_settings(config, sharding_of(config), arguments, evaluates=True)
    check_order(config)
    check_kept(arguments, config, sharding_of(config))
    return config


def check(arguments: Arguments, settings: dict[str, Any]) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    check_lora(arguments)
    separator_of(arguments.step_separator)
    for name, loss_types in ONLY_WITH.items():
        field = Arguments.model_fields.get(name)
        given = name in settings if field is None else getattr(arguments, name) != field.default
        if given and arguments.loss_type not in loss_types:
            raise InputError(f"`{name}` acts with loss_type {' and '.join(loss_types)} only: leave it out")
    if refused := [name for name in NOT_HERE if spelling(settings.get(name))]:
        raise InputError(f"`{refused[0]}` is not for reward models: leave it out")
    if arguments.heads and len(set(arguments.heads)) < len(arguments.heads):
        raise InputError(f"`heads`: a name stands twice in {', '.join(arguments.heads)}")
    if arguments.heads and arguments.score_key:
        raise InputError("`heads` names the rewards, and `score_key` does too: leave one out")
    if arguments.heads == [OUTPUT]:
        raise InputError(f"`heads`: `{OUTPUT}` is the name of a process reward model's output; call it otherwise")
    check_start(arguments.model_name_or_path)
    dataset_probs(arguments)


def main() -> None:
    arguments, settings = parse_training("reward_model/run_rm.py", Arguments, __doc__, config_class)
    check(arguments, settings)
    output, held_out_source = Path(arguments.output_dir), arguments.eval_dataset_name_or_path
    inputs = {"model": arguments.model_name_or_path, **source_inputs("pairs", arguments.dataset_name_or_path)}
    inputs |= source_inputs("held-out pairs", held_out_source) if held_out_source else {}
    inputs |= template_input(arguments.chat_template)
    metrics_path = metrics_file(output, arguments.metrics_path)
    refuse_input(metrics_path, inputs, "--metrics_path", output)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    stage = Stage.begin("reward model", arguments, output, inputs, settings, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    count, aside, no_pairs = count_pairs(arguments)
    config = checked(stage)

    import numpy as np

    from baton.training.checkpoints import SCRATCH, keep_checkpoints, train
    from baton.training.checks import check_tokens
    from baton.training.config import log_training
    from reward_model.make_trainer import make_trainer, outputs_of

    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    check_tokens(config, tokenizer)
    rows = rows_of(training_pairs(arguments, aside), "train", arguments, tokenizer, config)
    held_out = rows_of(held_out_pairs(arguments, aside), "held out", arguments, tokenizer, config)
    warn_of_trained_on(arguments)
    place_reports(settings, metrics_path)
    with loading(arguments.model_name_or_path):
        trainer = make_trainer(arguments, config, tokenizer, rows.data, held_out.data)
    log_training(trainer)
    records_in = count if held_out_source else count - len(held_out.data) - held_out.drops.counts.total()
    counts = {"in": records_in, "out": len(rows.data), "dropped": dict(rows.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    of_pairs = arguments.loss_type == "bradley_terry"
    what = "pairs" if of_pairs else "records"
    log.info("evaluating on %d held-out %s", len(held_out.data), what)
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card()
    if program.rank() != 0:
        return
    classifier = {"pad_token_id": trainer.processing_class.pad_token_id, "outputs": outputs_of(arguments)}
    if arguments.merge_adapter:
        to = stage.partial_folder, config, arguments.export_dtype
        metrics |= merge_adapter(arguments.model_name_or_path, *to, **classifier)
    keep_checkpoints(trainer, arguments, stage.partial_folder, **classifier)
    if not np.isfinite(trainer.rewards).all():
        raise InputError("rewards are not numbers: the training has diverged; --overwrite with a smaller `learning_rate`")
    found = quality(trainer.rewards, held_out.margins) if of_pairs else trainer.quality()
    (log_quality if of_pairs else log_scores)(found)
    left_out = {"dropped": dict(held_out.drops.counts), "noted": dict(held_out.noted)}
    stage.finish(
        records_in=records_in,
        records_out=len(rows.data),
        drops=rows.drops,
        noted=dict(rows.noted),
        no_pairs=dict(no_pairs.counts),
        held_out=found | {"loss": loss, what: len(held_out.data)} | left_out,
        metrics=metrics,
        scratch=SCRATCH,
    )


if __name__ == "__main__":
    program.run(main)
