"""An estimate of the memory that training takes, made before the model is loaded, from its configuration alone.

What is counted: weights, gradients and optimizer states exactly, by dtype, optimizer, ZeRO stage or FSDP, and adapter;
activations by a formula for Llama-like layers. What is not: the allocator's fragments, communication buffers, and the
GPU's context, together often some GiB. So it tells 20 GiB from 80, not 78 from 80.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute
import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.utils import strtobool

from baton.errors import InputError
from baton.models.logps import CHUNK_BYTES

log = logging.getLogger("baton")

# Bytes of optimizer states for each trained weight, where they do not have the weight's dtype; by parts of the name
STATE_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0, "lomo": 0, "sgd": 0}
BYTES_4_BIT = 0.56  # a weight in NF4 and its share of the scales


@dataclass(frozen=True)
class Sharding:
    """What is spread over the processes, and what is in the machine's RAM instead of on the GPU."""

    processes: int = 1
    stage: int = 0  # as ZeRO's: 1 spreads optimizer states, 2 gradients too, 3 weights too (FSDP)
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False


def sharding_of(config: Any) -> Sharding:
    """How a TrainingArguments and its launcher spread a model."""
    processes, plugin = config.world_size, config.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config["zero_optimization"]
        offloaded = [zero.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")]
        return Sharding(processes, plugin.zero_stage, True, *offloaded)
    fsdp = bool(config.fsdp) or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    return Sharding(processes, 3 if fsdp and config.device.type != "cpu" else 0)


def outline(model: str, adapter: Any = None) -> nn.Module:
    """A model with an adapter, of weights that have a shape and no content. Raises InputError if they do not go together."""
    if Path(model, "adapter_config.json").exists() and not Path(model, "config.json").exists():
        raise InputError(f"{model}: holds an adapter without its model; train it with --merge_adapter to start from it")
    configuration = AutoConfig.from_pretrained(model)
    name = (configuration.architectures or [""])[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise InputError(f"{model}: its config.json names the architecture {name!r}, which transformers does not have")
    with torch.device("meta"):
        outlined = architecture(configuration)
        if adapter is None:
            return outlined
        from peft import get_peft_model

        try:
            return get_peft_model(outlined, adapter)
        except ValueError as error:
            raise InputError(f"`lora_target_modules`: {error}") from None


def largest_batch(rows: Any, config: Any, packed: bool) -> int:
    """Tokens of one process's batch if all its pairs are as long as the longest; `rows` is a Dataset of token ids."""
    prompt, chosen, rejected = (
        pyarrow.compute.list_value_length(rows.data.column(f"{part}_ids")) for part in ("prompt", "chosen", "rejected")
    )
    pair = pyarrow.compute.add(pyarrow.compute.add(prompt, chosen), rejected)
    longest = pair if packed else pyarrow.compute.add(pair, prompt)
    return config.per_device_train_batch_size * pyarrow.compute.max(longest).as_py()


def estimate(
    model: nn.Module, config: Any, sharding: Sharding, tokens: int, *, in_4_bit: bool = False, reference: bool = False
) -> dict[str, float]:
    """Bytes that one process needs at the most, by what they hold; `offloaded` is in RAM, the rest on the device.

    Args:
        model: an `outline`, or a real model.
        tokens: of the largest batch of one process, in one forward pass.
        reference: whether a reference model is in memory too.
    """
    loaded = {"bfloat16": 2, "float16": 2, "auto": 2}.get(str((config.model_init_kwargs or {}).get("dtype")), 4)
    half = 2 if config.bf16 or config.fp16 else loaded
    frozen, trained = ([p.numel() for p in model.parameters() if p.requires_grad is wanted] for wanted in (False, True))
    adapted = bool(frozen)
    lookup, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weight = half if sharding.deepspeed else 4 if sharding.stage == 3 else loaded
    trained_weight = 4 if adapted and not sharding.deepspeed else weight  # PEFT keeps adapters in float32
    frozen_weight = half if sharding.deepspeed else loaded
    unpacked = head.numel() + (lookup.numel() if lookup is not head else 0)  # bitsandbytes leaves them as they are
    packed = sum(frozen) - unpacked if in_4_bit else 0
    named = next((size for part, size in STATE_BYTES.items() if part in config.optim.value), None)
    states = 2 * (4 if sharding.deepspeed else trained_weight) if named is None else named
    if sharding.deepspeed and half < 4:
        states += 4  # its own float32 copy of the weights
    spread = {"optimizer states": 1, "gradients": 2, "weights": 3}
    needs = {
        "weights": sum(trained) * trained_weight + (sum(frozen) - packed) * frozen_weight + packed * BYTES_4_BIT,
        "gradients": sum(trained) * trained_weight,
        "optimizer states": sum(trained) * states,
    }
    needs = {name: size / (sharding.processes if sharding.stage >= spread[name] else 1) for name, size in needs.items()}
    if reference:
        needs["reference"] = sum(frozen or trained) * loaded
    needs["activations"] = activations(model, config, tokens, half) + (0 if adapted else 4 * head.numel())
    offloaded = ["optimizer states"] * sharding.offload_optimizer + ["weights"] * sharding.offload_weights
    needs["offloaded"] = sum(needs.pop(name) for name in offloaded)
    return needs


def activations(model: nn.Module, config: Any, tokens: int, element: int) -> float:
    """Bytes that the forward pass keeps for the backward pass, of elements of so many bytes.

    10 hidden and 4 intermediate sizes a token and layer; with checkpointing those of one layer, and the hidden states
    between layers. At the head three float32 copies of one chunk of logits (`logps.CHUNK_BYTES`).
    """
    text = model.config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    layer = 10 * hidden + 4 * (getattr(text, "intermediate_size", None) or 4 * hidden)
    kept = layers * hidden + layer if config.activation_checkpointing else layers * layer
    return tokens * kept * element + 3 * CHUNK_BYTES.get(config.device.type, CHUNK_BYTES["cuda"])


def check_memory(needs: dict[str, float], config: Any) -> None:
    """Log an `estimate` as one line, and a warning where the device or the RAM has less than that."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_device = sum(size for name, size in needs.items() if name != "offloaded")
    in_ram = needs["offloaded"] * here
    free_ram = psutil.virtual_memory().available
    if config.device.type == "cuda":
        free = torch.cuda.mem_get_info(config.device)[0]
        places = [(f"{config.device}", on_device, free), ("the machine's RAM", in_ram, free_ram)]
    else:
        places = [("the machine's RAM", on_device * here + in_ram, free_ram)]
    parts = " + ".join(f"{gib(size)} {name}" for name, size in needs.items() if size)
    log.info("memory, estimated for each process: %s; free: %s", parts, ", ".join(f"{gib(f)} of {p}" for p, _, f in places))
    for place, wanted, free in places:
        if wanted > free:
            log.warning(
                "%s of %s are wanted by this estimate, %s are free. What takes less: a smaller per_device_train_batch_size "
                "with more gradient_accumulation_steps; gradient_checkpointing; model_init_kwargs: {dtype: bfloat16}; "
                "configs/zero2.yaml, zero3.yaml or fsdp.yaml on more GPUs; --use_peft, with --load_in_4bit",
                gib(wanted), place, gib(free),
            )  # fmt: skip


def gib(size: float) -> str:
    """Bytes as a text in GiB."""
    return f"{size / 2**30:.3g} GiB"
