"""An estimate of the memory that training takes, made before the model is loaded, from its configuration alone.

Weights, gradients and optimizer states are counted exactly, by dtype, optimizer, ZeRO stage or FSDP, and adapter;
activations by a formula for Llama-like layers. Not counted are the allocator's fragments, communication buffers, and the
GPU's context, together often some GiB. So the estimate distinguishes a 20 GiB machine from an 80 GiB one, not 78 GiB from 80.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import psutil
import pyarrow.compute
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.utils import strtobool

from baton.errors import InputError
from baton.models.forward import TOKENS_PER_ROW
from baton.models.logps import BLOCK_BYTES
from baton.parallel import data_parallel

log = logging.getLogger("baton")

FLOAT32_BYTES = 4
HALF_BYTES = 2  # bfloat16 and float16
NF4_BYTES = 0.56  # a weight in 4 bits and its share of the scales

# Bytes of optimizer states for each trained weight, where they do not have the weight's dtype; by parts of the name:
# two states in 8 or 4 bits, or none that grows with the number of weights.
STATE_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0, "lomo": 0, "sgd": 0}

# The ZeRO stage from which each part is spread over the processes; FSDP is as stage 3.
SPREAD_FROM_STAGE = {"optimizer states": 1, "gradients": 2, "weights": 3}


@dataclass(frozen=True)
class Sharding:
    """How a model that is trained is spread, and what of it is in the machine's RAM instead of on the GPU.

    `processes` are the data-parallel ranks that it is spread over. `stage` is ZeRO's: from 1 on they spread optimizer states,
    from 2 on gradients too, from 3 on weights too, as FSDP does.
    """

    processes: int = 1
    stage: int = 0
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False


def sharding_of(config: Any) -> Sharding:
    """How a TrainingArguments and its launcher spread a model."""
    processes, plugin = data_parallel().size, config.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config["zero_optimization"]
        offloaded = [zero.get(f"offload_{part}", {}).get("device", "none") != "none" for part in ("optimizer", "param")]
        return Sharding(processes, plugin.zero_stage, True, *offloaded)
    fsdp = bool(config.fsdp) or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    return Sharding(processes, 3 if fsdp and config.device.type != "cpu" else 0)


def outline(model: str, adapter: Any = None, outputs: int | None = None) -> nn.Module:
    """A model, with an adapter if one is given, whose weights have a shape and no content.

    With `outputs` it is a sequence classifier with so many of them, whatever the model is.

    Raises InputError for an unknown architecture, and for an adapter of modules that the model does not have or of its output
    embeddings: log-probabilities come of their weights alone, here and in TRL, so that their adapter would never be trained.
    """
    configuration = AutoConfig.from_pretrained(model)
    name = (configuration.architectures or [""])[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise InputError(f"{model}: its config.json names the architecture {name!r}, which transformers does not have")
    with torch.device("meta"):
        if outputs is None:
            outlined = architecture(configuration)
        else:
            configuration.num_labels = outputs
            outlined = AutoModelForSequenceClassification.from_config(configuration)
        if adapter is None:
            return outlined
        from peft import get_peft_model

        try:
            adapted = get_peft_model(outlined, adapter)
        except ValueError as error:
            raise InputError(f"`lora_target_modules`: {error}") from None
    head = outlined.get_output_embeddings()
    if hasattr(head, "base_layer"):
        name = next(name for name, module in outlined.named_modules() if module is head)
        raise InputError(
            f"`lora_target_modules`: an adapter of the output embeddings ({name}) would never be trained: leave them out, or "
            "give `all-linear`, which does"
        )
    return adapted


def largest_batch(
    rows: Any, config: Any, packed: bool, tokens_per_row: int | None = None, sides: Sequence[str] = ("chosen", "rejected")
) -> int:
    """Tokens of one process's largest forward pass if its pairs are as long as the longest; `rows` is a Dataset of token ids.

    Args:
        tokens_per_row: where each row has a pass of its own: most tokens of one that is longer than the longest pair.
        sides: the responses to a prompt, of a pair or of KTO's examples, which have one; `packed` they share it.
    """
    prompt, *responses = (pyarrow.compute.list_value_length(rows.data.column(f"{part}_ids")) for part in ("prompt", *sides))
    parts = [prompt, *responses] if packed else [part for response in responses for part in (prompt, response)]
    return largest_row(pyarrow.compute.max(reduce(pyarrow.compute.add, parts)).as_py(), config, tokens_per_row)


def largest_row(longest: int, config: Any, tokens_per_row: int | None) -> int:
    """As `largest_batch`, of members of which the longest has so many tokens in a pass."""
    if tokens_per_row is None:
        return config.per_device_train_batch_size * longest
    share = config.per_device_train_batch_size * config.gradient_accumulation_steps * longest
    return max(longest, min(tokens_per_row, share))


def estimate(
    model: nn.Module, config: Any, sharding: Sharding, tokens: int, *, in_4_bit: bool = False, reference: bool = False
) -> dict[str, float]:
    """Bytes that one process needs at the most, by what they hold; `offloaded` is in RAM, the rest on the device.

    Args:
        model: an `outline`, or a real model. Where some of its weights are frozen, the others are an adapter.
        tokens: of the largest batch of one process, in one forward pass.
        in_4_bit: whether the frozen weights are loaded in 4 bits.
        reference: whether a reference model is in memory too.
    """
    trained, frozen = count_weights(model, trained=True), count_weights(model, trained=False)
    adapter = frozen > 0
    trained_size = trained_weight_bytes(config, sharding)
    whole = {
        "weights": trained * trained_size + frozen_bytes(model, frozen, config, sharding, in_4_bit),
        "gradients": trained * trained_size,  # of the same dtype as the weights
        "optimizer states": trained * state_bytes(config, sharding, trained_size),
    }
    needs = {name: spread(size, name, sharding) for name, size in whole.items()}
    if not sharding.deepspeed and sharding.stage == 0 and computing_bytes(config) < trained_size:
        needs["copies that autocast makes"] = trained * HALF_BYTES  # of every weight, until a forward pass ends
    if reference:
        needs["reference"] = reference_bytes(model, config, sharding)
    needs["activations"] = activations(model, config, tokens, computing_bytes(config)) + head_gradient_bytes(model, adapter)
    return offload(needs, sharding)


def estimate_reference(model: nn.Module, config: Any, sharding: Sharding, *, in_4_bit: bool = False) -> dict[str, float]:
    """As `estimate`, for the reference alone, which computes its log-probabilities before the policy is loaded.

    `model` is the `outline` of the policy: the reference is taken to be of its size.
    """
    size = reference_bytes(model, config, sharding, in_4_bit)
    text = model.config.get_text_config()
    computed = TOKENS_PER_ROW * layer_elements(text) * computing_bytes(config)  # without gradients one layer's are kept
    return offload({"weights": size, "activations": computed + head_bytes(config)}, replace(sharding, offload_optimizer=False))


def reference_bytes(model: nn.Module, config: Any, sharding: Sharding, in_4_bit: bool = False) -> float:
    """Bytes of one process's share of the reference, of as many weights as the policy has without its adapter."""
    weights = count_weights(model, trained=False) or count_weights(model, trained=True)
    if in_4_bit:
        return frozen_bytes(model, weights, config, sharding, in_4_bit)
    loaded_in_shards = sharding.deepspeed and sharding.stage == 3  # at once in the half dtype
    size = computing_bytes(config) if loaded_in_shards else loaded_weight_bytes(model, config)
    return spread(weights * size, "weights", sharding)


def count_weights(model: nn.Module, *, trained: bool) -> int:
    """How many weights of a model are trained, or are not."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad is trained)


def loaded_weight_bytes(model: nn.Module, config: Any) -> int:
    """Bytes of a weight as it is loaded: float32 is TRL's default; `auto` is the dtype that the checkpoint names."""
    dtype = str((config.model_init_kwargs or {}).get("dtype"))
    named = str(model.config.dtype) if dtype == "auto" else dtype
    return HALF_BYTES if named.removeprefix("torch.") in ("bfloat16", "float16") else FLOAT32_BYTES


def computing_bytes(config: Any) -> int:
    """Bytes of a number that layers compute: autocast computes in half precision whatever the weights are."""
    return HALF_BYTES if config.bf16 or config.fp16 else FLOAT32_BYTES


def trained_weight_bytes(config: Any, sharding: Sharding) -> int:
    """Bytes of a weight that is trained, of the model or of an adapter: float32 (`config.loaded_dtype`).

    DeepSpeed computes with weights of its own in half precision; its float32 copy counts as an optimizer state.
    """
    return computing_bytes(config) if sharding.deepspeed else FLOAT32_BYTES


def frozen_bytes(model: nn.Module, frozen: int, config: Any, sharding: Sharding, in_4_bit: bool) -> float:
    """Bytes of the `frozen` weights under an adapter."""
    size = computing_bytes(config) if sharding.deepspeed else loaded_weight_bytes(model, config)
    if not in_4_bit:
        return frozen * size
    lookup, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    # bitsandbytes leaves them as they are
    not_quantized = lookup.numel() + (0 if head is None or head.weight is lookup else head.weight.numel())
    quantized = frozen - not_quantized
    return not_quantized * size + quantized * NF4_BYTES


def state_bytes(config: Any, sharding: Sharding, trained_size: int) -> int:
    """Bytes of optimizer states for each trained weight, which has `trained_size` bytes.

    Two of the weight's dtype, as AdamW has, unless the optimizer is one of `STATE_BYTES`. DeepSpeed keeps them in float32, and
    beside them a float32 copy of weights that have a half dtype.
    """
    known = next((size for part, size in STATE_BYTES.items() if part in config.optim.value), None)
    states = 2 * (FLOAT32_BYTES if sharding.deepspeed else trained_size) if known is None else known
    copied = sharding.deepspeed and computing_bytes(config) < FLOAT32_BYTES
    return states + (FLOAT32_BYTES if copied else 0)


def spread(size: float, name: str, sharding: Sharding) -> float:
    """One process's share of the `size` bytes of a part named in `SPREAD_FROM_STAGE`."""
    return size / (sharding.processes if sharding.stage >= SPREAD_FROM_STAGE[name] else 1)


def head_gradient_bytes(model: nn.Module, adapter: bool) -> int:
    """Bytes of the LM head's gradient of one pass, beside that of the step.

    An adapter does not train the head, and a reward model or critic has none.
    """
    head = model.get_output_embeddings()
    return 0 if adapter or head is None else FLOAT32_BYTES * head.weight.numel()


def offload(needs: dict[str, float], sharding: Sharding) -> dict[str, float]:
    """`needs` with what is in the machine's RAM instead of on the GPU as `offloaded`."""
    parts = ["optimizer states"] * sharding.offload_optimizer + ["weights"] * sharding.offload_weights
    on_device = {name: size for name, size in needs.items() if name not in parts}
    return on_device | {"offloaded": sum(needs[name] for name in parts)}


def with_critic(actor: dict[str, float], critic: dict[str, float]) -> dict[str, float]:
    """An `estimate` of an actor with that of its critic: as one number, but for what of it is in RAM."""
    on_device = sum(critic.values()) - critic["offloaded"]
    return actor | {"critic": on_device, "offloaded": actor["offloaded"] + critic["offloaded"]}


def activations(model: nn.Module, config: Any, tokens: int, element: int) -> float:
    """Bytes that the forward pass keeps for the backward pass, of elements of so many bytes.

    10 hidden and 4 intermediate sizes a token and layer; with checkpointing those of one layer, and the hidden states
    between layers. At the head one block of logits (`logps.BLOCK_BYTES`).
    """
    text = model.config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    layer = layer_elements(text)
    kept = layers * hidden + layer if config.activation_checkpointing else layers * layer
    return tokens * kept * element + head_bytes(config)


def layer_elements(text: Any) -> int:
    """Elements that one layer of a text model's configuration computes for a token: 10 hidden and 4 intermediate sizes."""
    return 10 * text.hidden_size + 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)


def head_bytes(config: Any) -> int:
    """Bytes of the logits at the head."""
    return BLOCK_BYTES.get(config.device.type, BLOCK_BYTES["cpu"])


def check_memory(needs: dict[str, float], config: Any, before: dict[str, float] | None = None) -> None:
    """Log an `estimate` as one line, and a warning where the device or the RAM has less than that.

    `before` is what is in memory before training and not while it trains: an `estimate_reference`. The larger one counts.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine, which share its RAM
    phases = [needs, before] if before else [needs]
    on_device = max(sum(phase.values()) - phase["offloaded"] for phase in phases)
    in_ram = max(phase["offloaded"] for phase in phases) * processes
    free_ram = psutil.virtual_memory().available
    if config.device.type == "cuda":
        free = torch.cuda.mem_get_info(config.device)[0]
        places = [(f"{config.device}", on_device, free), ("the machine's RAM", in_ram, free_ram)]
    else:
        places = [("the machine's RAM", on_device * processes + in_ram, free_ram)]
    parts = ", or before that for the reference: ".join(
        " + ".join(f"{gib(size)} {name}" for name, size in phase.items() if size) for phase in phases
    )
    log.info("memory, estimated for each process: %s; free: %s", parts, ", ".join(f"{gib(f)} of {p}" for p, _, f in places))
    for place, wanted, free in places:
        if wanted > free:
            log.warning(
                "by this estimate training needs %s of %s, where %s are free. What takes less: a smaller tokens_per_row, or a "
                "smaller per_device_train_batch_size with more gradient_accumulation_steps; gradient_checkpointing; "
                "configs/zero2.yaml, zero3.yaml or fsdp.yaml on more GPUs; --use_peft, with --load_in_4bit",
                gib(wanted), place, gib(free),
            )  # fmt: skip


def gib(size: float) -> str:
    """Bytes as a text in GiB."""
    return f"{size / 2**30:.3g} GiB"
