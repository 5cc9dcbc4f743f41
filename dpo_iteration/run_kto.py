"""KTO: responses labelled desirable or undesirable in, the next policy out, on TRL's KTOTrainer.

    python dpo_iteration/run_kto.py configs/kto.yaml                                                  # one process
    accelerate launch --config_file configs/zero2.yaml dpo_iteration/run_kto.py configs/kto.yaml      # eight GPUs

Responses need no partner: {"prompt", "completion", "label"} with label true or false, as texts or messages. Annotated
responses ({"prompt", "responses", "rewards"}) are desirable above one threshold of the reward and undesirable below
another, by default above and below the mean of their prompt; preference pairs are one of each. KTO is of Ethayarajh et al.,
2024, arXiv 2402.01306. Every field of TRL's KTOConfig is accepted in the YAML file and as a flag (`beta`,
`desirable_weight`, `undesirable_weight`, …). The reference policy's log-probabilities are computed once, before the policy
is loaded, and kept beside the output. With `--use_peft` an adapter is trained; `--merge_adapter` writes it merged into the
policy, as the next round needs it.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from baton import jsonl, program
from baton.ahead import note_adapter
from baton.arguments import option
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer
from baton.prompts import source_inputs
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.task import batch_together
from baton.training.adapters import LoraArguments, check_lora
from baton.training.arguments import early_stopping_option, keep_checkpoints_option, metrics_file, parse_training
from baton.training.data import DataArguments, dataset_probs
from baton.training.held_out import NONE
from baton.training.reports import check_outside, place_reports
from dpo_iteration.account import IN, Account
from dpo_iteration.example_rows import held_out_rows, holds_out, label_settings, prompts_aside, rows_of, write_examples
from dpo_iteration.rows import check_lengths, log_rows

log = logging.getLogger("baton")


class Arguments(DataArguments, LoraArguments):
    """What this program adds to KTOConfig."""

    model_name_or_path: str = option(..., "the policy to start from", changes_result=False)
    ref_model: str | None = option(None, "the reference policy; default: the starting policy", changes_result=False)
    dataset_name_or_path: str = option(
        ...,
        "labelled (`completion`, `label`), annotated (`responses`, `rewards`) or paired (`chosen`, `rejected`) responses; "
        "several files or datasets with commas between",
        changes_result=False,
    )
    output_key: str | None = option(None, "key of the labelled response, if it is not `completion`")
    label_key: str | None = option(None, "key of the label, if it is not `label`")
    chosen_key: str | None = option(None, "key of a pair's better response, if it is not `chosen`")
    rejected_key: str | None = option(None, "key of a pair's worse response, if it is not `rejected`")
    score_key: str | None = option(None, "key of the score of a response in data sets such as UltraFeedback (docs/data.md)")
    max_samples: int | None = option(None, "use only the first N records", ge=1)
    eval_dataset_name_or_path: str | None = option(
        None,
        "held-out responses of the same kinds, of which the loss is computed at `eval_steps` and at the end",
        changes_result=False,
    )
    eval_dataset_split: str = option("test", "split of a held-out Hugging Face dataset")
    eval_every: int | None = option(
        None, "hold out one prompt in so many where no held-out file is given, with all its examples", ge=2
    )
    output_dir: str = option(
        ..., "folder of the finished policy (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    examples_path: str | None = option(
        None, "file for the labelled examples; default: <output_dir>.examples.jsonl", changes_result=False
    )
    desirable_above: float | None = option(
        None, "annotated responses with a reward above this are desirable; default: the mean of the prompt's rewards"
    )
    undesirable_below: float | None = option(
        None, "annotated responses with a reward below this are undesirable; default: the mean of the prompt's rewards"
    )
    drop_truncated: bool = option(False, "leave out responses that were cut off by length")
    max_length: int = option(2048, "longest prompt and response together, in tokens; responses are cut to fit", ge=2)
    max_prompt_length: int = option(1024, "longest prompt, in tokens; longer ones are dropped and counted", ge=1)
    seed: int = option(42, "seed of the training and of the order of the examples")
    tokens_per_row: int = option(
        4096,
        "most tokens of a packed row in an evaluation by one process; a training batch of a process is one row, and so is what "
        "each of several processes evaluates at a time",
        ge=1,
        changes_result=False,
    )
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def config_class() -> type:
    from trl import KTOConfig

    return KTOConfig


def check(arguments: Arguments) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    label_settings(arguments)
    check_lora(arguments)
    dataset_probs(arguments)
    check_lengths(arguments.max_prompt_length, arguments.max_length)
    for model in models_of(arguments):
        check_start(model)


def models_of(arguments: Arguments) -> tuple[str, str]:
    """The starting policy and the reference."""
    return arguments.model_name_or_path, arguments.ref_model or arguments.model_name_or_path


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's KTOConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, models_of(arguments), ahead=arguments.check)
    from baton.training.checks import check_kept, check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of
    from dpo_iteration import kto
    from dpo_iteration.checks import check_noise

    # `precompute_ref_log_probs`, TRL's name for: the reference's log-probabilities stand in the rows, no reference is loaded.
    fixed = {"max_length": arguments.max_length, "seed": arguments.seed, "precompute_ref_log_probs": True}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings | fixed, Arguments.model_fields, stage, adapter, kept)
    check_noise(config, "leave it out")
    config.per_device_eval_batch_size = config.per_device_train_batch_size  # the KL term is one of a batch
    check_settings(config, sharding_of(config), arguments, evaluates=holds_out(arguments))
    check_kept(arguments, config, sharding_of(config))
    kto.check_config(config)
    return config


def main() -> None:
    arguments, settings = parse_training("dpo_iteration/run_kto.py", Arguments, __doc__, config_class)
    check(arguments)
    model, reference = models_of(arguments)
    inputs = {"model": model, "reference": reference, **source_inputs("data", arguments.dataset_name_or_path)}
    held_out = arguments.eval_dataset_name_or_path
    inputs |= source_inputs("held-out data", held_out) if held_out else {}
    inputs |= template_input(arguments.chat_template)
    output = Path(arguments.output_dir)
    examples_path = Path(arguments.examples_path or f"{output}.examples.jsonl")
    metrics_path = metrics_file(output, arguments.metrics_path)
    refuse_input(examples_path, inputs, "--examples_path", output)
    refuse_input(metrics_path, inputs | {"examples_path": examples_path}, "--metrics_path", output)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    # KTO's KL term is a mean over the examples that all processes compute at a time.
    stage = Stage.begin("kto", arguments, output, inputs, settings | batch_together(settings), config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import train
    from baton.training.config import log_training
    from dpo_iteration.finish import finish
    from dpo_iteration.kto import WITHOUT_KL, balance_advice, make_trainer

    aside, labelled = NONE, Account()
    if program.rank() == 0:  # with the process group there, or another machine would not notice that this fails
        aside = prompts_aside(arguments, least=1 if config.loss_type == WITHOUT_KL else 2)  # the KL term compares prompts
        labelled = write_examples(examples_path, arguments, aside)
    tokenizer = load_tokenizer(model, arguments.chat_template)
    dataset, account = rows_of(arguments, examples_path, labelled, tokenizer, config)
    evaluated, held_out_account = None, Account()
    if holds_out(arguments):
        evaluated, held_out_account = held_out_rows(arguments, aside, tokenizer, config)
    desirable = sum(dataset["label"])
    undesirable = len(dataset) - desirable
    if program.rank() == 0:
        log_rows(dataset, tokenizer, account.drops, account.counted)
        log.info("%d desirable and %d undesirable examples", desirable, undesirable)
        if advice := balance_advice(desirable, undesirable, config):
            log.warning("%s", advice)
    place_reports(settings, metrics_path)
    with loading(model, reference):
        trainer = make_trainer(arguments, config, tokenizer, dataset, evaluated, reference, examples_path.parent)
    log_training(trainer)
    counts = {"in": account.counted[IN], "out": len(dataset), "dropped": dict(account.drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() == 0:
        where, first = next(jsonl.read(examples_path))
        learnt = [*first["prompt"], {"role": "assistant", "content": first["completion"]}], where
        examples = {"desirable": desirable, "undesirable": undesirable, **account.facts}
        finish(trainer, stage, arguments, learnt, account, held_out_account, metrics, examples=examples)


if __name__ == "__main__":
    program.run(main)
