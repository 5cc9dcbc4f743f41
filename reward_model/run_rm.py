"""Train a Bradley-Terry reward model from preference pairs, on TRL's RewardTrainer with packed rows.

    python reward_model/run_rm.py configs/rm.yaml                                                     # one process
    accelerate launch --config_file configs/zero2.yaml reward_model/run_rm.py configs/rm.yaml         # eight GPUs

Pairs are {"prompt", "chosen", "rejected"} in any of the common shapes. Chosen and rejected share their prompt, which is
computed once. The loss is -log sigmoid(r_chosen - r_rejected) (Bradley and Terry, 1952; Ouyang et al., 2022, arXiv 2203.02155,
equation 1), with the pair's margin subtracted from the difference if --margin_scale says so. The held-out accuracy with its
interval, by margin too, the calibration, and the mean rewards of chosen and rejected responses go into the manifest. Every
field of TRL's RewardConfig is accepted too.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from baton import program
from baton.ahead import note_adapter
from baton.arguments import option
from baton.drops import Drops
from baton.errors import InputError
from baton.jsonl import Record
from baton.keys import with_usual_keys
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer
from baton.preferences import preference_records
from baton.prompts import mixed_records, source_inputs
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.training.adapters import LoraArguments, adapter_config, check_lora, merge_adapter, quantization_config
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
from baton.training.reports import check_outside, place_reports
from reward_model.quality import quality
from reward_model.rows import rows_of_preferences

log = logging.getLogger("baton")

POOR_ACCURACY = 0.6

IMPORTS = ("reward_model.trainer", "baton.training.checkpoints", "baton.training.rows")


class Arguments(DataArguments, LoraArguments):
    """What this program adds to RewardConfig."""

    model_name_or_path: str = option(..., "the model to start from: a folder or a Hugging Face name", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "preference pairs to train on; several files or datasets with commas between", changes_result=False
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


def training_pairs(arguments: Arguments, count: int) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each pair that is trained on, of a file of pairs of `count` prompts."""
    for number, pair in numbered(all_pairs(arguments)):
        if arguments.eval_dataset_name_or_path or not _is_held_out(number, arguments, count):
            yield pair


def held_out_pairs(arguments: Arguments, count: int) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of each held-out pair: all of the held-out file, else those of some of the `count` prompts."""
    if arguments.eval_dataset_name_or_path:
        records = mixed_records(arguments.eval_dataset_name_or_path, arguments.eval_dataset_split, None)
        yield from _preferences(records, arguments)
        return
    for number, pair in numbered(all_pairs(arguments)):
        if _is_held_out(number, arguments, count):
            yield pair


def numbered(pairs: Iterable[tuple[str, Record]]) -> Iterator[tuple[int, tuple[str, Record]]]:
    """Yield each pair with the number of its prompt: several pairs in a row may be of one, and are held out together."""
    for number, (_, of_prompt) in enumerate(groupby(pairs, key=lambda pair: pair[1]["prompt"])):
        for pair in of_prompt:
            yield number, pair


def all_pairs(arguments: Arguments, drops: Drops | None = None) -> Iterator[tuple[str, Record]]:
    """Yield ("where", pair) of the training files; `drops` gets what makes no pair."""
    split, probs, most = arguments.dataset_split, dataset_probs(arguments), arguments.max_samples
    records = mixed_records(arguments.dataset_name_or_path, split, probs, max_samples=most)
    return _preferences(records, arguments, drops)


def _preferences(
    records: Iterable[tuple[str, Record]], arguments: Arguments, drops: Drops | None = None
) -> Iterator[tuple[str, Record]]:
    keys = {"prompt": arguments.dataset_key, "chosen": arguments.chosen_key, "rejected": arguments.rejected_key}
    most, score = arguments.max_pairs_per_prompt, arguments.score_key
    return preference_records(with_usual_keys(records, keys), most, score, drops)


def _is_held_out(number: int, arguments: Arguments, count: int) -> bool:
    """Whether a prompt of the training file is held out: the last of every `eval_every`, at least one where there are fewer."""
    every = min(arguments.eval_every, count)
    return number % every == every - 1


def rows_of(
    pairs: Iterable[tuple[str, Record]], name: str, tokenizer: Any, config: Any, margin_scale: float
) -> tuple[Any, Any, Drops]:
    """The token ids of pairs, a dataset called `name`, their margins, and what was dropped.

    The margins are (N,), NaN where a pair has none; with `margin_scale` so many times each is the dataset's `margin`. Process 0
    alone reads the pairs, and alone knows what was dropped. Raises InputError where a margin is needed that a pair has not.
    """
    import numpy as np
    from datasets import Features, List, Value

    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    drops = Drops()
    make = partial(rows_of_preferences, tokenizer, config.max_length)
    features = Features({**dict.fromkeys(("chosen_ids", "rejected_ids"), List(Value("int64"))), "margin": Value("float64")})

    def token_ids():
        left = False
        for row in tokenised(make, pairs, drops, Counter()):
            left = True
            yield row
        if not left:
            raise InputError(f"no pair is left ({name}); dropped: {drops}")

    rows = rows_on_disk(token_ids, config, name, features)
    margins = np.array(rows["margin"][:], dtype=np.float64)
    rows = rows.remove_columns("margin")
    if not margin_scale:
        return rows, margins, drops
    if without := int(np.isnan(margins).sum()):
        raise InputError(
            f"`margin_scale` needs the margin of every pair, but {without} pairs have neither `margin` nor `chosen_reward` and "
            "`rejected_reward`; leave them out, or leave `margin_scale` at 0"
        )
    return rows.add_column("margin", margin_scale * margins), margins, drops


def config_class() -> type:
    from trl import RewardConfig

    return RewardConfig


def count_pairs(arguments: Arguments) -> tuple[int, int, Drops]:
    """How many pairs the training files hold, of how many prompts, and what of them makes no pair.

    Raises InputError where there are too few.
    """
    drops, source, count, prompts = Drops(), arguments.dataset_name_or_path, 0, 0
    for number, _ in numbered(all_pairs(arguments, drops)):
        count, prompts = count + 1, number + 1
    if count < 2:
        raise InputError(f"{source}: holds {count} pairs, at least 2 are needed; dropped: {drops}")
    if prompts < 2 and not arguments.eval_dataset_name_or_path:
        raise InputError(f"{source}: all pairs are of one prompt, so none can be held out: give --eval_dataset_name_or_path")
    if drops.counts:
        log.info("%s: %d pairs; what makes none: %s", source, count, drops)
    return count, prompts, drops


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


def make_trainer(arguments: Arguments, config: Any, tokenizer: Any, rows: Any, held_out: Any) -> Any:
    """The trainer, its model loaded; `held_out` are rows to evaluate on."""
    from transformers import set_seed

    from reward_model.trainer import PackedRewardTrainer

    set_seed(config.seed)  # the head's random weights are drawn before the trainer does this
    return PackedRewardTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapter_config(arguments, "SEQ_CLS"),
        quantization_config=quantization_config(arguments, config),
        tokens_per_row=arguments.tokens_per_row,
        head_init=arguments.head_init,
        router_aux_loss_coef=arguments.router_aux_loss_coef,
        compile_layers=arguments.compile,
    )


def log_quality(found: dict[str, Any]) -> None:
    """Log the `quality` of the rewards, and a warning where it says that the reward model is of no use."""
    low, high = found["accuracy_interval"]
    numbers = {name: value for name, value in found.items() if isinstance(value, float)}
    log.info("held out: %s", ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    log.info("held out: 95 %% interval of the accuracy %.3f to %.3f", low, high)
    for bucket in found["by_margin"]:
        log.info("held out: margin %(from).3g to %(to).3g: accuracy %(accuracy).3f of %(pairs)d pairs", bucket)
    if found["accuracy"] < POOR_ACCURACY:
        log.warning(
            "held-out accuracy %.2f is little better than chance: a policy trained on these rewards learns noise. "
            "Check the pairs' labels, the learning rate and the chat template",
            found["accuracy"],
        )


def check(arguments: Arguments) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    check_lora(arguments)
    check_start(arguments.model_name_or_path)
    dataset_probs(arguments)


def main() -> None:
    arguments, settings = parse_training("reward_model/run_rm.py", Arguments, __doc__, config_class)
    check(arguments)
    held_out = arguments.eval_dataset_name_or_path
    inputs = {"model": arguments.model_name_or_path, **source_inputs("pairs", arguments.dataset_name_or_path)}
    inputs |= source_inputs("held-out pairs", held_out) if held_out else {}
    inputs |= template_input(arguments.chat_template)
    metrics_path = metrics_file(arguments.output_dir, arguments.metrics_path)
    refuse_input(metrics_path, inputs, "--metrics_path", arguments.output_dir)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(Path(arguments.output_dir))
    stage = Stage.begin("reward model", arguments, Path(arguments.output_dir), inputs, settings, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    count, prompts, no_pairs = count_pairs(arguments)
    config = checked(stage)

    import numpy as np

    from baton.training.checkpoints import SCRATCH, keep_checkpoints, train
    from baton.training.config import log_training

    tokenizer = load_tokenizer(arguments.model_name_or_path, arguments.chat_template)
    scale = arguments.margin_scale
    rows, _, drops = rows_of(training_pairs(arguments, prompts), "train", tokenizer, config, scale)
    held_out_rows, margins, held_out_drops = rows_of(held_out_pairs(arguments, prompts), "held out", tokenizer, config, scale)
    place_reports(settings, metrics_path)
    with loading(arguments.model_name_or_path):
        trainer = make_trainer(arguments, config, tokenizer, rows, held_out_rows)
    log_training(trainer)
    records_in = count if held_out else count - len(held_out_rows) - held_out_drops.counts.total()
    counts = {"in": records_in, "out": len(rows), "dropped": dict(drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    log.info("evaluating on %d held-out pairs", len(held_out_rows))
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card()
    if program.rank() == 0:
        if arguments.merge_adapter:
            pad = trainer.processing_class.pad_token_id
            metrics |= merge_adapter(arguments.model_name_or_path, stage.partial_folder, config, arguments.export_dtype, pad)
        keep_checkpoints(trainer, arguments, stage.partial_folder, pad=trainer.processing_class.pad_token_id)
        if not np.isfinite(trainer.rewards).all():
            raise InputError("rewards are not numbers: the training has diverged; --overwrite with a smaller `learning_rate`")
        found = quality(trainer.rewards, margins)
        log_quality(found)
        held_out_facts = found | {"loss": loss, "pairs": len(held_out_rows), "dropped": dict(held_out_drops.counts)}
        counts = {"records_in": records_in, "records_out": len(rows), "drops": drops}
        facts = {"no_pairs": dict(no_pairs.counts), "held_out": held_out_facts, "metrics": metrics}
        stage.finish(**counts, **facts, scratch=SCRATCH)


if __name__ == "__main__":
    program.run(main)
