"""Knowledge distillation: a teacher's distributions over the next token in, a student that follows them out.

    python distillation/run_kd.py configs/kd.yaml                                                     # one process
    accelerate launch --config_file configs/zero2.yaml distillation/run_kd.py configs/kd.yaml         # eight GPUs

The data are demonstrations of any common shape (baton/demonstrations.py), or what the student itself has sampled
({"prompt", "responses", "response_token_ids"}, GKD's on-policy distillation, arXiv 2306.13649), whose token ids are used as
they are. The teacher, of the same tokenizer, reads them first and alone; its likeliest tokens at each position are kept in
files beside the output, which may be deleted afterwards. Then the student is trained on kd_coef * divergence +
(1 - kd_coef) * NLL, as in OpenRLHF. Every field of TRL's SFTConfig is accepted in the YAML file and as a flag.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from baton import program
from baton.ahead import note_adapter
from baton.arguments import option
from baton.drops import Drops
from baton.errors import InputError
from baton.keys import with_usual_keys
from baton.launch.check import check_processes
from baton.models.templates import load_tokenizer, template_warning
from baton.prompts import mixed_records, source_inputs
from baton.sources import check_start, loading, refuse_input, template_input
from baton.stage import Stage
from baton.task import spelling
from baton.training.adapters import LoraArguments, adapter_config, check_lora, merge_adapter, quantization_config
from baton.training.arguments import (
    early_stopping_option,
    keep_checkpoints_option,
    metrics_file,
    parse_training,
    tokens_per_row_option,
)
from baton.training.data import DataArguments, dataset_probs
from baton.training.demonstrations import Demonstration, rows_of_demonstrations
from baton.training.reports import check_outside, place_reports
from distillation.losses import LossName
from distillation.rows import examples_of

log = logging.getLogger("baton")

# Settings of SFTConfig that choose a loss or a way to pack, of which this program has its own.
OTHERS = (
    *("loss_type", "label_smoothing_factor", "packing", "eval_packing", "padding_free", "assistant_only_loss"),
    *("completion_only_loss", "router_aux_loss_coef", "dataset_kwargs"),
)


class Arguments(DataArguments, LoraArguments):
    """What this program adds to SFTConfig."""

    model_name_or_path: str = option(..., "the student: a folder or a Hugging Face name", changes_result=False)
    teacher_model: str = option(..., "the teacher, with the student's tokenizer", changes_result=False)
    dataset_name_or_path: str = option(
        ..., "demonstrations or sampled responses: .jsonl, .jsonl.gz, .json, .parquet or a Hugging Face dataset; several with "
        "commas between",
        changes_result=False,
    )  # fmt: skip
    output_key: str | None = option(
        None, "key of the demonstrated response, or of a whole conversation such as `chosen`, if it is an unusual one"
    )
    max_samples: int | None = option(None, "use only the first N records", ge=1)
    eval_dataset: str | None = option(
        None, "held-out data, of which the loss is computed at `eval_steps` and at the end", changes_result=False
    )
    output_dir: str = option(
        ..., "folder of the finished student (in generation/ and annotate_data/ this flag names a file)", changes_result=False
    )
    kd_coef: float = option(0.4, "weight of the divergence from the teacher; that of the NLL is 1 - kd_coef", ge=0, le=1)
    kd_loss: LossName = option("forward_kl", "the divergence: of the student from the teacher, the reverse, or between both")
    beta: float | None = option(
        None, "with kd_loss jensen_shannon: the teacher's weight in the mixture; default: 0.5", gt=0, lt=1
    )
    teacher_top_k: int = option(
        64,
        "tokens of a position whose log-probabilities are kept, 8 bytes each: the teacher's likeliest, and the learnt one; all "
        "others count as one",
        ge=2,
    )
    teacher_offload: bool = option(
        False, "accepted for OpenRLHF's sake: the teacher is never in memory with the student", changes_result=False
    )
    max_length: int = option(2048, "longest conversation, in tokens; longer ones are dropped and counted, texts cut", ge=2)
    tokens_per_row: int = tokens_per_row_option("conversation")
    keep_checkpoints: int = keep_checkpoints_option()
    early_stopping: int | None = early_stopping_option()


def config_class() -> type:
    from trl import SFTConfig

    return SFTConfig


def check(arguments: Arguments, settings: dict[str, Any]) -> None:
    """Raise InputError for what can be refused before anything is read or imported."""
    check_lora(arguments)
    for model in (arguments.model_name_or_path, arguments.teacher_model):
        check_start(model)
    dataset_probs(arguments)
    if arguments.beta is not None and arguments.kd_loss != "jensen_shannon":
        raise InputError("`beta` acts with `kd_loss` jensen_shannon only: leave it out")
    for name in OTHERS:
        if name in settings:
            raise InputError(
                f"`{name}` does nothing here: the loss is that of `kd_loss` and `kd_coef` on the assistant's tokens, and rows "
                "are packed in any case; leave it out"
            )
    asked = [name for name in ("do_eval", "eval_strategy") if spelling(settings.get(name)) not in (None, False, "no")]
    if asked and not arguments.eval_dataset:
        raise InputError(f"`{asked[0]}` needs data to evaluate on: name it with --eval_dataset, or leave it out")


def examples(arguments: Arguments, source: str) -> Iterator[Demonstration]:
    """Yield what is to be learnt of `source`, of the first `max_samples` records. Raises InputError on the first bad one."""
    trained_on = source == arguments.dataset_name_or_path
    probs, most = (dataset_probs(arguments), arguments.max_samples) if trained_on else (None, None)
    records = mixed_records(source, arguments.dataset_split, probs, max_samples=most)
    for where, record in with_usual_keys(records, {"prompt": arguments.dataset_key, "response": arguments.output_key}):
        yield from examples_of(record, where)


def rows_of(arguments: Arguments, source: str, tokenizer: Any, config: Any, name: str) -> tuple[Any, int, Drops, Counter[str]]:
    """The token ids of `source`, a dataset; of process 0, how many responses went in, what was dropped, and what was counted.

    Raises InputError if no row is left.
    """
    from baton.training.rows import rows_on_disk
    from baton.training.tokenising import tokenised

    count = sum(1 for _ in examples(arguments, source)) if program.rank() == 0 else 0
    drops, counted = Drops(), Counter()
    make = partial(rows_of_demonstrations, tokenizer, arguments.max_length)

    def token_ids():
        yield from tokenised(make, examples(arguments, source), drops, counted, count)
        if drops.counts.total() == count:
            raise InputError(f"{source}: no response is left to learn from; dropped: {drops}")

    rows = rows_on_disk(token_ids, config, name)
    log.info("%s: %s; dropped: %s", name, ", ".join(f"{number} {origin}" for origin, number in counted.items()), drops)
    return rows, count, drops, counted


def checked_config(arguments: Arguments, settings: dict[str, Any], stage: Stage) -> Any:
    """TRL's SFTConfig. Raises InputError for settings that cannot train."""
    check_outside(settings, [arguments.model_name_or_path, arguments.teacher_model], ahead=arguments.check)
    from baton.training.checks import check_kept, check_order, check_settings
    from baton.training.config import trainer_config
    from baton.training.memory import sharding_of

    # TRL prepares texts; these rows are token ids already.
    settings = settings | {"max_length": arguments.max_length, "dataset_kwargs": {"skip_prepare_dataset": True}}
    adapter, kept = arguments.use_peft, arguments.keep_checkpoints
    config = trainer_config(config_class(), settings, Arguments.model_fields, stage, adapter, kept)
    check_settings(config, sharding_of(config), arguments, evaluates=bool(arguments.eval_dataset))
    check_order(config)
    check_kept(arguments, config, sharding_of(config))
    return config


def teacher_tokenizer(teacher: str) -> Any:
    """The teacher's tokenizer, which needs no chat template. Raises InputError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(teacher)
    except (OSError, ValueError) as error:
        raise InputError(f"{teacher}: its tokenizer cannot be loaded: {error}") from None


def make_trainer(arguments: Arguments, config: Any, tokenizer: Any, rows: Any, held_out: Any | None, folder: Path) -> Any:
    """The trainer: the teacher is loaded first, and alone, and what it says of the rows is kept in `folder`.

    Logs the memory that this takes, before anything is loaded. `held_out` are rows to evaluate on.
    """
    from baton.training.learnt import outline as outline_rows
    from baton.training.memory import check_memory, estimate, estimate_reference, outline, sharding_of
    from distillation.teacher import check_packable, kept_teacher, teacher_config
    from distillation.trainer import PackedKDTrainer

    adapter, quantization = adapter_config(arguments), quantization_config(arguments, config)
    student, teacher = outline(arguments.model_name_or_path, adapter), outline(arguments.teacher_model)
    for model in (student.get_base_model() if adapter else student, teacher):
        check_packable(model)
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    outlined = outline_rows(rows)
    longest = int((outlined.prompts + outlined.responses).max())
    tokens = max(longest, min(arguments.tokens_per_row, step_size(config) * longest))
    sharding, top = sharding_of(config), min(arguments.teacher_top_k, *sizes)
    needs = estimate(student, config, sharding, tokens, in_4_bit=quantization is not None)
    needs["the teacher's tokens"] = tokens * top * BYTES_OF_KEPT
    check_memory(needs, config, estimate_reference(teacher, teacher_config(config), sharding))
    keep = {"teacher": arguments.teacher_model, "config": config, "folder": folder, "top": top, "vocabulary": min(sizes)}
    more = {}
    if held_out is not None:
        of_held_out = outline_rows(held_out)
        kept = kept_teacher(held_out, of_held_out, **keep)
        more = {"eval_dataset": held_out, "eval_outline": of_held_out, "eval_teacher": kept}
    return PackedKDTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=rows,
        outline=outlined,
        teacher=kept_teacher(rows, outlined, **keep),
        whole=top == max(sizes),
        loss=arguments.kd_loss,
        beta=0.5 if arguments.beta is None else arguments.beta,
        kd_coef=arguments.kd_coef,
        tokens_per_row=arguments.tokens_per_row,
        processing_class=tokenizer,
        peft_config=adapter,
        quantization_config=quantization,
        **more,
    )


BYTES_OF_KEPT = 4 * 12  # float32 copies of a token's numbers in the loss and its gradient, of student and teacher


def step_size(config: Any) -> int:
    """Conversations of one process's share of a step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def main() -> None:
    arguments, settings = parse_training("distillation/run_kd.py", Arguments, __doc__, config_class)
    check(arguments, settings)
    output, student, teacher = Path(arguments.output_dir), arguments.model_name_or_path, arguments.teacher_model
    inputs = {"model": student, "teacher": teacher, **source_inputs("data", arguments.dataset_name_or_path)}
    inputs |= template_input(arguments.chat_template)
    inputs |= source_inputs("held-out data", arguments.eval_dataset) if arguments.eval_dataset else {}
    metrics_path = metrics_file(output, arguments.metrics_path)
    refuse_input(metrics_path, inputs, "--metrics_path", output)
    checked = partial(checked_config, arguments, settings)
    if arguments.use_peft and not arguments.merge_adapter:
        note_adapter(output)
    stage = Stage.begin("kd", arguments, output, inputs, settings, config_class, checked)
    if stage is None:
        return
    check_processes(settings.get("use_cpu"))
    config = checked(stage)

    from baton.training.checkpoints import SCRATCH, keep_checkpoints, last_evaluation, stop_at_end_of_turn, train
    from baton.training.config import log_training
    from distillation.teacher import check_tokenizers

    if arguments.teacher_offload:
        log.info("`teacher_offload`: the teacher runs first and alone, so there is nothing to offload")
    tokenizer = load_tokenizer(student, arguments.chat_template)
    check_tokenizers(tokenizer, teacher_tokenizer(teacher), (student, teacher))
    rows, count, drops, counted = rows_of(arguments, arguments.dataset_name_or_path, tokenizer, config, "examples")
    held_out = arguments.eval_dataset and rows_of(arguments, arguments.eval_dataset, tokenizer, config, "held_out")[0]
    if held_out is not None and arguments.eval_dataset == arguments.dataset_name_or_path:
        log.warning("`eval_dataset` is the data that is trained on, so what is evaluated is not held out")
    warning = template_warning(counted, tokenizer)
    if warning:
        log.warning("%s", warning)
    place_reports(settings, metrics_path)
    with loading(student, teacher):
        trainer = make_trainer(arguments, config, tokenizer, rows, held_out, output.parent)
    log_training(trainer)
    out = count - drops.counts.total()  # a long text gives several rows
    counts = {"in": count, "out": out, "dropped": dict(drops.counts)}
    metrics = train(trainer, stage, arguments.export_dtype, metrics_path, counts, arguments.early_stopping)
    if program.rank() == 0:
        if arguments.merge_adapter:
            metrics |= merge_adapter(student, stage.partial_folder, config, arguments.export_dtype)
        every = examples(arguments, arguments.dataset_name_or_path)
        first = next((each for each in every if not isinstance(each.messages, str)), None)

        def finish(folder: Path) -> None:
            if first:
                stop_at_end_of_turn(folder, tokenizer, first.messages, first.where)

        finish(stage.partial_folder)
        keep_checkpoints(trainer, arguments, stage.partial_folder, finish)
        if held_out is not None:
            metrics |= last_evaluation(trainer)
        stage.finish(records_in=count, records_out=out, drops=drops, metrics=metrics, scratch=SCRATCH)
        if warning:
            log.warning("%s", warning)


if __name__ == "__main__":
    program.run(main)
