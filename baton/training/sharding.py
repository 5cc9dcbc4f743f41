"""Models that are not trained, held as the trained one is: spread over the processes by ZeRO-3 or FSDP, in its precision.

What a policy's forward pass computes in is decided by the launcher as well: DeepSpeed and FSDP (of version 2) cast all weights
to the half dtype and use no autocast, DDP and a single process use autocast. A reference whose log-probabilities shall equal
the policy's to rounding has to run in the same way.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState, init_empty_weights
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from baton.training.memory import sharding_of


@contextmanager
def unsharded(config: Any) -> Iterator[None]:
    """Context in which a model loads whole, and is taken to be whole, in a run under ZeRO-3 as well.

    `config` is a TrainingArguments; while it is alive, Transformers shards every model that it loads.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    sharding = getattr(config, "hf_deepspeed_config", None) or config.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(sharding)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of a model's weights, so that all must run its forward pass equally often."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def uses_fsdp(config: Any) -> bool:
    """Whether a TrainingArguments and its launcher train under FSDP."""
    sharding = sharding_of(config)
    return sharding.stage == 3 and not sharding.deepspeed


def half_dtype(config: Any) -> torch.dtype | None:
    """The half dtype that a TrainingArguments computes in; None: the weights' own."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def weights_are_cast(config: Any) -> bool:
    """Whether the policy computes in a half dtype because its weights are cast to it, and not by autocast."""
    return half_dtype(config) is not None and (config.deepspeed_plugin is not None or uses_fsdp(config))


def autocast(config: Any):
    """The autocast in which the policy's forward pass runs."""
    dtype = None if weights_are_cast(config) else half_dtype(config)
    return nullcontext() if dtype is None else torch.autocast(config.device.type, dtype)


def spread_by_fsdp(load: Callable[[], PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model without gradients, spread over the processes and computing as Accelerate prepares a policy for FSDP.

    Process 0 alone holds the weights, in RAM, and the others get their shards from it.

    Args:
        load: loads the model on the CPU.
        config: a TrainingArguments, for its precision, device and FSDP settings.
    """
    given = config.fsdp_plugin_args or {}
    first = PartialState().is_main_process
    with nullcontext() if first else init_empty_weights(include_buffers=False):
        model = load().requires_grad_(False)
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="true"):  # the plugin sets it, for what is loaded later
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
            state_dict_type="FULL_STATE_DICT",
            cpu_ram_efficient_loading=True, cpu_offload=given.get("cpu_offload"),
            transformer_cls_names_to_wrap=given.get("transformer_cls_names_to_wrap"),
        )  # fmt: skip
    if half_dtype(config) is not None:
        plugin.set_mixed_precision(half_dtype(config))
        keep_outputs(plugin)
    # What `fsdp2_prepare_model` reads of an Accelerator. "no" leaves weights without gradients in the dtype they have.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=config.device,
        is_main_process=first,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def keep_outputs(fsdp_plugin: Any) -> None:
    """Keep what models return in the dtype that they computed it in: Accelerate has FSDP round it to the half dtype.

    Log-probabilities that are to be summed lose too much by that.
    """
    policy = fsdp_plugin.mixed_precision_policy
    if fsdp_plugin.fsdp_version == 2 and policy is not None:
        fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def with_engine(model: PreTrainedModel, config: Any) -> nn.Module:
    """DeepSpeed's engine around a model that is not trained, in the precision of the policy's; spread where that is.

    Under ZeRO-3 `model` should have been loaded in shards, or each process holds it whole for a while.
    """
    import deepspeed

    plugin = config.deepspeed_plugin
    zero = {name: value for name, value in plugin.deepspeed_config["zero_optimization"].items() if value != "auto"}
    zero.pop("offload_optimizer", None)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": config.bf16},
        "fp16": {"enabled": config.fp16},
        "zero_optimization": copy.deepcopy(zero) if plugin.zero_stage == 3 else {"stage": 0},
    }
    if plugin.zero_stage == 3:
        plugin.set_moe_leaf_modules(model)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    return engine


def free(model: nn.Module) -> None:
    """Take DeepSpeed's engine and its weights off a model that is not used again. Its last reference frees what is left."""
    if hasattr(model, "destroy"):
        model.destroy()
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):  # what ZeRO-3's hooks refer to is never collected, so it is emptied
            parameter.data = parameter.data.new_empty(0)
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


class KeepsFloat32:
    """A trainer whose batches keep the numbers that they come with, for a class before Transformers' Trainer.

    Under DeepSpeed that one converts them to the weights' dtype, and bfloat16 rounds a log-probability of -200 by half a nat.
    """

    def _prepare_input(self, data: Any) -> Any:
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)
