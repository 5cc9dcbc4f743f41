"""Training settings that cannot work, or silently do something else, refused before a model is loaded: those of every trainer.

TRL's and Transformers' own checks of one setting are not repeated, unless they come after loading.
"""

import os
from typing import Any

import torch

from baton.errors import InputError
from baton.models.agreement import check_batch
from baton.training.adapters import LoraArguments
from baton.training.memory import Sharding
from baton.training.sharding import half_dtype

BF16_SINCE = (8, 0)  # compute capability of the first GPUs (Ampere) that multiply in bf16


def check_settings(config: Any, sharding: Sharding, lora: LoraArguments | None = None, evaluates: bool = False) -> None:
    """Raise InputError for settings of a trainer (TrainingArguments) that cannot train, whatever it trains.

    Args:
        lora: of a program that can train an adapter.
        evaluates: whether there is data to evaluate on.
    """
    check_precision(config, torch.cuda.get_device_capability(config.device) if config.device.type == "cuda" else None)
    check_launcher(config)
    check_amount(config)
    check_checkpoints(config)
    if not evaluates and (config.do_eval or config.eval_strategy != "no"):
        name = "eval_strategy" if config.eval_strategy != "no" else "do_eval"
        raise InputError(f"`{name}`: this program has no data to evaluate on; leave it out")
    if lora is not None:
        check_adapter(lora, config, sharding)


def check_precision(config: Any, capability: tuple[int, int] | None) -> None:
    """Raise InputError where the precision of `config` (TrainingArguments) does not suit the device.

    Args:
        capability: the GPU's compute capability; None: no CUDA GPU.
    """
    if config.bf16 and capability is not None and capability < BF16_SINCE:
        version = ".".join(map(str, capability))
        raise InputError(
            f"`bf16`: this GPU (compute capability {version}) only imitates it, slowly; set `fp16: true` and `bf16: false`"
        )
    if config.fp16 and config.device.type == "cpu":
        raise InputError("`fp16` needs a GPU; on a CPU set `bf16: true`, or neither")


def check_launcher(config: Any) -> None:
    """Raise InputError where `accelerate launch` alone sets a precision, which would then train without being of the task."""
    if config.mixed_precision != "no" and not (config.bf16 or config.fp16):
        raise InputError(
            f"the launcher's `mixed_precision: {config.mixed_precision}` would train in it in spite of `bf16: false` and "
            '`fp16: false`: set `bf16: true` or `fp16: true`, or launch with `mixed_precision: "no"`'
        )


def check_amount(config: Any) -> None:
    """Raise InputError where a training of no steps, no epochs or empty batches is requested."""
    if config.max_steps < 1 and config.max_steps != -1:
        raise InputError(f"`max_steps`: {config.max_steps} would train by epochs; give 1 or more, or leave it out")
    if config.max_steps == -1 and config.num_train_epochs <= 0:
        raise InputError(f"`num_train_epochs` must be above 0, got {config.num_train_epochs}")
    if config.auto_find_batch_size:
        raise InputError(
            "`auto_find_batch_size` halves the global batch when memory runs out, and so trains something else: leave it out, "
            "and give a smaller `per_device_train_batch_size` with more `gradient_accumulation_steps`"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"`{name}` must be 1 or more, got {getattr(config, name)}")


def check_checkpoints(config: Any) -> None:
    """Raise InputError where a killed run could not go on from its checkpoints."""
    if config.save_only_model:
        raise InputError(
            "`save_only_model` leaves the optimizer out of the checkpoints, so that a killed run could not go on from them: "
            "leave it out; the finished folder holds the model alone in any case"
        )


def check_kept(arguments: Any, config: Any, sharding: Sharding) -> None:
    """Raise InputError where `early_stopping` has no evaluations to go by, or checkpoints that shall be kept are not there.

    Args:
        arguments: of a program that has `early_stopping` and `keep_checkpoints`.
    """
    if arguments.early_stopping is not None and not config.load_best_model_at_end:
        raise InputError(
            "`early_stopping` needs `load_best_model_at_end: true`, with `eval_strategy` and `save_strategy` alike, or the "
            "last weights would be exported and not the best: set it, or leave `early_stopping` out"
        )
    count = arguments.keep_checkpoints
    if not count:
        return
    if config.save_strategy == "no":
        raise InputError("`keep_checkpoints`: `save_strategy: no` writes none; leave one of them out")
    if config.save_total_limit is not None and config.save_total_limit < count:
        raise InputError(
            f"`keep_checkpoints` {count}: `save_total_limit` {config.save_total_limit} deletes some of them; leave it out"
        )
    if sharding.stage == 3 and not arguments.use_peft and not _writes_whole(config):
        raise InputError(
            "`keep_checkpoints`: these checkpoints hold shards of the model alone; set `zero3_save_16bit_model: true` or "
            "`fsdp_state_dict_type: FULL_STATE_DICT` in the launcher's configuration, as in configs/"
        )


def _writes_whole(config: Any) -> bool:
    """Whether a checkpoint of a model that is spread over processes has the whole model too."""
    if config.deepspeed_plugin is not None:
        zero = config.deepspeed_plugin.deepspeed_config["zero_optimization"]
        return bool(zero.get("stage3_gather_16bit_weights_on_model_save"))
    return "FULL" in os.environ.get("FSDP_STATE_DICT_TYPE", "")


def check_order(config: Any, remedy: str = "leave it out") -> None:
    """Raise InputError where rows are to be ordered by their length."""
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise InputError(
            f"`train_sampling_strategy`: {config.train_sampling_strategy} saves padding, of which packed rows have none, and a "
            f"step's rows are dealt to processes by what they cost: {remedy}"
        )


def check_tokens(config: Any, tokenizer: Any) -> None:
    """Raise InputError where `eos_token` or `pad_token` is none of the tokenizer's: TRL sees it once the model is loaded."""
    known = tokenizer.get_vocab()
    for name in ("eos_token", "pad_token"):
        token = getattr(config, name)
        if token is not None and token not in known:
            raise InputError(f"`{name}`: {token!r} is not in the vocabulary of {tokenizer.name_or_path}")
    if not (config.pad_token or tokenizer.pad_token or tokenizer.eos_token):
        raise InputError(f"{tokenizer.name_or_path}: its tokenizer has no padding token: name one of its tokens in `pad_token`")


def check_adapter(lora: LoraArguments, config: Any, sharding: Sharding) -> None:
    """Raise InputError for settings of an adapter that the trainer's settings make void, or that its sharding cannot hold."""
    if lora.lora_dropout and getattr(config, "disable_dropout", False):
        raise InputError("`lora_dropout` does nothing with `disable_dropout`, TRL's default: add --disable_dropout false")
    if lora.load_in_4bit and sharding.stage == 3:
        raise InputError(
            "`load_in_4bit` does not go with ZeRO-3 or FSDP, which cannot spread 4-bit weights: use configs/ddp.yaml"
        )


def check_packing(trainer: Any, model: torch.nn.Module, inputs: dict[str, torch.Tensor], remedy: str) -> None:
    """Raise InputError where the packed log-probabilities of a batch are not those of the model's own forward pass.

    Takes one forward pass of the batch and one of each sequence, without gradients; all processes take part.

    Args:
        trainer: a Trainer of packed rows; `model` is its model as its steps use it.
        inputs: the batch: `input_ids`, `attention_mask`, `completion_mask`.
        remedy: ends the message: what to do.
    """
    dtype = half_dtype(trainer.args) or trainer.model.dtype
    training = model.training
    model.eval()
    check_batch(model, inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], dtype, remedy)
    model.train(training)
