"""From a program's arguments and its rows to the trainer: memory is estimated first, then the model is loaded."""

from functools import partial
from typing import Any

from transformers import set_seed

from baton.steps import OUTPUT
from baton.training.adapters import adapter_config, quantization_config
from baton.training.memory import check_memory, estimate, largest_row, outline, sharding_of
from baton.training.sharding import unsharded
from reward_model.packing import lengths_of, lengths_of_scores
from reward_model.score_trainer import PackedScoreTrainer
from reward_model.trainer import PackedRewardTrainer, why_padded


def make_trainer(arguments: Any, config: Any, tokenizer: Any, rows: Any, held_out: Any) -> Any:
    """The trainer, its model loaded; `held_out` are rows to evaluate on. `arguments` are those of run_rm.py."""
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


def outputs_of(arguments: Any) -> list[str] | None:
    """The names of the model's outputs, or None where it has one without a name."""
    return [OUTPUT] if arguments.loss_type == "process" else arguments.heads


def check_memory_of(arguments: Any, config: Any, rows: Any) -> None:
    """Log the memory that training takes, before the model is loaded, and warn where there is less."""
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
