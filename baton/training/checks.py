"""Training settings that cannot work, or silently do something else, refused before a model is loaded.

TRL's and Transformers' own checks of one setting are not repeated, unless they come after loading.
"""

from typing import Any

import torch

from baton.errors import InputError
from baton.training.memory import Sharding

BF16_SINCE = (8, 0)  # compute capability of the first GPUs (Ampere) that multiply in bf16


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


def check_training(arguments: Any, config: Any, sharding: Sharding) -> None:
    """Raise InputError for a combination of settings that cannot train.

    Args:
        arguments: those of run_dpo.py.
        config: a DPOConfig.
    """
    check_precision(config, torch.cuda.get_device_capability(config.device) if config.device.type == "cuda" else None)
    if "exo_pair" in config.loss_type and not config.label_smoothing:
        raise InputError("`loss_type` exo_pair needs `label_smoothing` above 0, such as 0.001")
    if config.max_steps < 1 and config.max_steps != -1:
        raise InputError(f"`max_steps`: {config.max_steps} would train by epochs; give 1 or more, or leave it out")
    if config.max_steps == -1 and config.num_train_epochs <= 0:
        raise InputError(f"`num_train_epochs` must be above 0, got {config.num_train_epochs}")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(config, name) < 1:
            raise InputError(f"`{name}` must be 1 or more, got {getattr(config, name)}")
    if config.eval_strategy != "no":
        raise InputError("`eval_strategy`: run_dpo.py has no held-out pairs to evaluate on; leave it out")
    if config.sync_ref_model and arguments.forward == "packed":
        raise InputError("`sync_ref_model` changes the reference, whose log-probabilities are computed once; add --forward trl")
    if config.sync_ref_model and arguments.use_peft:
        raise InputError("`sync_ref_model` does not go with `use_peft`, whose reference is the model without the adapter")
    half_weights = (config.model_init_kwargs or {}).get("dtype") == "float16"
    if config.fp16 and half_weights and not arguments.use_peft and not sharding.deepspeed:
        raise InputError("`fp16` scales the gradients of float32 weights; leave `dtype: float16` out of `model_init_kwargs`")
    if arguments.lora_dropout and config.disable_dropout:
        raise InputError("`lora_dropout` does nothing with `disable_dropout`, TRL's default: add --disable_dropout false")
    if arguments.load_in_4bit and sharding.stage == 3:
        raise InputError(
            "`load_in_4bit` does not go with ZeRO-3 or FSDP, which cannot spread 4-bit weights: use configs/ddp.yaml"
        )


def check_pairs(pairs: int, config: Any) -> None:
    """Raise InputError where there are too few pairs for one batch on every process.

    Accelerate would give some processes pairs of the others, which then count twice; with `dataloader_drop_last` there
    would be no step at all.
    """
    batch = config.per_device_train_batch_size * config.world_size
    if pairs < batch and (config.world_size > 1 or config.dataloader_drop_last):
        raise InputError(
            f"{pairs} pairs are fewer than one batch: {config.world_size} processes x `per_device_train_batch_size` "
            f"{config.per_device_train_batch_size}; use fewer processes or a smaller batch"
        )
