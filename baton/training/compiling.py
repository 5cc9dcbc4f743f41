"""A model's decoder layers compiled by torch: where that is possible, whether it pays, and how.

A compiled layer computes what lies between its matrix products (norms, the gate, rotary positions, residuals) in few passes
over memory. To compile takes time before the first step, so it pays in a long training alone.
"""

import logging
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from baton.errors import InputError
from baton.models.attention import NAME, shared_prefix_attention
from baton.training.arguments import Compile
from baton.training.memory import Sharding

log = logging.getLogger("baton")

# Floating-point operations of one process's training from which compiling saves more time than it takes, by the device: the
# seconds that it takes, times the operations a second without it, over the share of them that it saves.
PAYS_FROM = {"cpu": 2e14, "cuda": 5e16}


def compile_where_it_pays(
    model: PreTrainedModel, how: Compile, flops: float, config: Any, sharding: Sharding, in_4_bit: bool
) -> bool:
    """Compile a model's layers if `how` is on, or if it is `auto` and the training is long enough; returns whether it did.

    `auto` is a rule of the training as a whole: all processes decide alike, and those that go on with it after a death.

    Args:
        model: that is trained, inside an adapter's wrapper, before Accelerate prepares it.
        flops: of one process's share of the training.
        config: a TrainingArguments.
    Raises:
        InputError: `on`, where layers cannot be compiled.
    """
    if how == "off" or (how == "auto" and flops < PAYS_FROM.get(config.device.type, PAYS_FROM["cuda"])):
        return False
    reason = obstacle(config, sharding, in_4_bit)
    if reason and how == "on":
        raise InputError(f"`compile`: on, but {reason}; set it to auto or off")
    if reason:
        log.info("layers are not compiled: %s", reason)
        return False
    compile_layers(model)
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    log.info("layers are compiled in the first step, for a minute or more; %s keeps what was compiled", cache_dir())
    return True


def obstacle(config: Any, sharding: Sharding, in_4_bit: bool) -> str | None:
    """Why the layers of this training cannot be compiled, or None where they can."""
    if in_4_bit:
        return "4-bit weights are not compiled"
    if sharding.stage == 3:
        return f"{'ZeRO-3' if sharding.deepspeed else 'FSDP'} gathers a layer's weights while it runs"
    if config.torch_compile:
        return "`torch_compile` compiles the model already"
    if getattr(config, "activation_offloading", False):
        return "`activation_offloading` takes what layers keep one by one"
    if config.activation_checkpointing and (config.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        return "activation checkpointing with `use_reentrant` runs a layer without gradients first"
    # torch's compiler takes seconds to import.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler: install g++"
    return None


def compile_layers(model: PreTrainedModel) -> None:
    """Have a model's decoder layers compiled when they run with gradients; weights and their names stay.

    One compiled function serves all layers of a kind and rows of any length. Attention over packed trees runs outside of it (on
    a GPU compiled by itself), and so does activation checkpointing, which then computes a compiled layer again. Without
    gradients, as in an evaluation, layers run as they are: another compilation would not pay.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(shared_prefix_attention))
    compiled: dict[type, Callable] = {}
    for layer in decoder_layers(model):
        kind = type(layer)
        compiled[kind] = compiled.get(kind) or torch.compile(_own_forward(kind), dynamic=True)
        layer.forward = types.MethodType(partial(_forward, compiled[kind]), layer)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that activation checkpointing computes one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _own_forward(kind: type[GradientCheckpointingLayer]) -> Callable:
    """A layer's forward without Transformers' wrapper for activation checkpointing, in versions that have it there."""
    return kind.forward.__wrapped__ if _checkpoints_in_forward(kind) else kind.forward


def _checkpoints_in_forward(kind: type[GradientCheckpointingLayer]) -> bool:
    return kind.forward.__code__.co_name == "forward_with_checkpointing"


def _forward(compiled: Callable, layer: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    kind = type(layer)
    if not torch.is_grad_enabled():
        return kind.forward(layer, *args, **kwargs)
    if layer.gradient_checkpointing and layer.training and _checkpoints_in_forward(kind):
        return layer._gradient_checkpointing_func(partial(compiled, layer, **kwargs), *args)
    return compiled(layer, *args, **kwargs)
