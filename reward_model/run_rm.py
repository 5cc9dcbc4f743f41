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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
from baton.steps import OUTPUT, separator_of, stepwise_records
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
from reward_model.score_rows import rows_of_scores, rows_of_steps, scored_records

log = logging.getLogger("baton")

POOR_ACCURACY = 0.6

# Settings that only some values of `loss_type` read.
ONLY_WITH = {
    "heads": ("regression",),
    "step_separator": ("process",),
    "score_key": ("bradley_terry", "regression"),
    **dict.fromkeys(("chosen_key", "rejected_key", "max_pairs_per_prompt", "loss", "margin_scale"), ("bradley_terry",)),
    **dict.fromkeys(("router_aux_loss_coef", "center_rewards_coefficient"), ("bradley_terry",)),  # the last is TRL's
}

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
    """Yield ("where", pair), or what another `loss_type` learns from in its place."""
    if arguments.loss_type != "bradley_terry":
        records = with_usual_keys(records, {"prompt": arguments.dataset_key})
        of_steps = arguments.loss_type == "process"
        return stepwise_records(records) if of_steps else scored_records(records, arguments.score_key, arguments.heads)
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

    The margins are (N,), NaN where a pair has none; with `margin_scale` so many times each is the dataset's `margin`. Raises
    InputError where a margin is needed that a pair has not.
    """
    import numpy as np
    from datasets import Features, List, Value

    make = partial(rows_of_preferences, tokenizer, config.max_length)
    features = Features({**dict.fromkeys(("chosen_ids", "rejected_ids"), List(Value("int64"))), "margin": Value("float64")})
    rows, drops = dataset_of(make, pairs, name, config, features)
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


def score_rows_of(
    examples: Iterable[tuple[str, Record]], name: str, arguments: Arguments, tokenizer: Any, config: Any
) -> tuple[Any, Drops]:
    """The rows of responses with rewards, or with labelled steps, a dataset called `name`, and what was dropped."""
    from datasets import Features, List, Value

    if arguments.loss_type == "process":
        make = partial(rows_of_steps, tokenizer, config.max_length, separator_of(arguments.step_separator))
    else:
        pad = tokenizer.convert_tokens_to_ids(config.pad_token or tokenizer.pad_token or tokenizer.eos_token)  # as TRL
        make = partial(rows_of_scores, tokenizer, config.max_length, pad)
    ids, number = List(Value("int64")), Value("int64")
    features = {"sequences": List(ids), "places": List(ids), "targets": List(Value("float64"))}
    features |= {"shared": number, "lengths": ids, "reads": number}
    return dataset_of(make, examples, name, config, Features(features))


def dataset_of(
    make: Callable[..., Iterator[dict[str, Any]]], examples: Iterable[tuple[str, Record]], name: str, config: Any, features: Any
) -> tuple[Any, Drops]:
    """What `make` gives of pairs or other examples, a dataset called `name`, and what was dropped.

    Process 0 alone reads them, and alone knows what was dropped. Raises InputError where nothing is left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    drops, counted = Drops(), Counter()

    def token_ids():
        left = False
        for row in tokenised(make, examples, drops, counted):
            left = True
            yield row
        if not left:
            what = "pair" if "chosen_ids" in features else "record"
            raise InputError(f"no {what} is left ({name}); dropped: {drops}")

    rows = rows_on_disk(token_ids, config, name, features)
    for what, count in counted.items():
        log.warning("%s: %d %s", name, count, what)
    return rows, drops


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
    what = "pairs" if arguments.loss_type == "bradley_terry" else "records"
    if count < 2:
        raise InputError(f"{source}: holds {count} {what}, at least 2 are needed; dropped: {drops}")
    if prompts < 2 and not arguments.eval_dataset_name_or_path:
        raise InputError(f"{source}: all {what} are of one prompt, so none can be held out: give --eval_dataset_name_or_path")
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


def outputs_of(arguments: Arguments) -> list[str] | None:
    """The names of the model's outputs, or None where it has one without a name."""
    return [OUTPUT] if arguments.loss_type == "process" else arguments.heads


def check_memory_of(arguments: Arguments, config: Any, rows: Any) -> None:
    """Log the memory that training takes, before the model is loaded, and warn where there is less."""
    from baton.training.memory import check_memory, estimate, largest_row, outline, sharding_of
    from baton.training.sharding import unsharded
    from reward_model.packing import lengths_of, lengths_of_scores
    from reward_model.trainer import why_padded

    with unsharded(config):
        outputs = len(outputs_of(arguments) or [""])
        outlined = outline(arguments.model_name_or_path, adapter_config(arguments, "SEQ_CLS"), outputs)
    prompts, responses = lengths_of(rows) if arguments.loss_type == "bradley_terry" else lengths_of_scores(rows)
    packed = not why_padded(outlined, config)
    if packed:
        tokens = largest_row(int((prompts + responses.sum(axis=1)).max()), config, arguments.tokens_per_row)
    else:
        tokens = largest_row(2 * int((prompts + responses.max(axis=1)).max()), config, None)
    check_memory(estimate(outlined, config, sharding_of(config), tokens, in_4_bit=arguments.load_in_4bit), config)


def make_trainer(arguments: Arguments, config: Any, tokenizer: Any, rows: Any, held_out: Any) -> Any:
    """The trainer, its model loaded; `held_out` are rows to evaluate on."""
    from transformers import set_seed

    from reward_model.score_trainer import PackedScoreTrainer
    from reward_model.trainer import PackedRewardTrainer

    check_memory_of(arguments, config, rows)
    set_seed(config.seed)  # the head's random weights are drawn before the trainer does this
    made = PackedRewardTrainer
    if arguments.loss_type != "bradley_terry":
        made = partial(PackedScoreTrainer, loss_type=arguments.loss_type, outputs=outputs_of(arguments))
    return made(
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


def log_scores(found: dict[str, Any]) -> None:
    """Log what `score_quality` says of each output, or `step_quality` of steps."""
    for name, numbers in found.get("heads", {"steps": found}).items():
        shown = {key: value for key, value in numbers.items() if isinstance(value, float)}
        log.info("held out: %s: %s", name, ", ".join(f"{key} {value:.3f}" for key, value in shown.items()))


def check(arguments: Arguments, settings: dict[str, Any]) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    check_lora(arguments)
    separator_of(arguments.step_separator)
    for name, loss_types in ONLY_WITH.items():
        field = Arguments.model_fields.get(name)
        given = name in settings if field is None else getattr(arguments, name) != field.default
        if given and arguments.loss_type not in loss_types:
            raise InputError(f"`{name}` acts with loss_type {' and '.join(loss_types)} only: leave it out")
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
    of_pairs, scale = arguments.loss_type == "bradley_terry", arguments.margin_scale
    learnt, aside = training_pairs(arguments, prompts), held_out_pairs(arguments, prompts)
    if of_pairs:
        rows, _, drops = rows_of(learnt, "train", tokenizer, config, scale)
        held_out_rows, margins, held_out_drops = rows_of(aside, "held out", tokenizer, config, scale)
    else:
        rows, drops = score_rows_of(learnt, "train", arguments, tokenizer, config)
        held_out_rows, held_out_drops = score_rows_of(aside, "held out", arguments, tokenizer, config)
    place_reports(settings, metrics_path)
    with loading(arguments.model_name_or_path):
        trainer = make_trainer(arguments, config, tokenizer, rows, held_out_rows)
    log_training(trainer)
    records_in = count if held_out else count - len(held_out_rows) - held_out_drops.counts.total()
    counts = {"in": records_in, "out": len(rows), "dropped": dict(drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    what = "pairs" if of_pairs else "records"
    log.info("evaluating on %d held-out %s", len(held_out_rows), what)
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card()
    if program.rank() == 0:
        classifier = {"pad_token_id": trainer.processing_class.pad_token_id, "outputs": outputs_of(arguments)}
        if arguments.merge_adapter:
            to = stage.partial_folder, config, arguments.export_dtype
            metrics |= merge_adapter(arguments.model_name_or_path, *to, **classifier)
        keep_checkpoints(trainer, arguments, stage.partial_folder, **classifier)
        if not np.isfinite(trainer.rewards).all():
            raise InputError("rewards are not numbers: the training has diverged; --overwrite with a smaller `learning_rate`")
        found = quality(trainer.rewards, margins) if of_pairs else trainer.quality()
        (log_quality if of_pairs else log_scores)(found)
        held_out_facts = found | {"loss": loss, what: len(held_out_rows), "dropped": dict(held_out_drops.counts)}
        counts = {"records_in": records_in, "records_out": len(rows), "drops": drops}
        facts = {"no_pairs": dict(no_pairs.counts), "held_out": held_out_facts, "metrics": metrics}
        stage.finish(**counts, **facts, scratch=SCRATCH)


if __name__ == "__main__":
    program.run(main)
