"""DeepSpeed's float32 copy of the weights that it trains: where it is without ZeRO, and how it gets what the start holds.

Under `bf16` and `fp16` DeepSpeed casts a model first and makes its float32 copy of what is left. A start in float32, such as the
policy of the round before, has bits that the cast drops: they are read from its files and put into the copy.
"""

import logging
from collections.abc import Mapping
from itertools import groupby
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from baton.training.export import Checkpoint, layer_of

log = logging.getLogger("baton")


@torch.no_grad()
def start_from_files(model: PreTrainedModel, copies: Mapping[int, Tensor]) -> None:
    """Set DeepSpeed's float32 copy of a model's trained weights from the files of the checkpoint that it was loaded from.

    To be called by every process before the first step. Weights whose dtype the files have already are left alone, and so
    are those that the files do not hold, such as a reward model's new head.

    Args:
        model: inside DeepSpeed's engine, in a half precision.
        copies: those of `copies_without_zero`.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained:
        return
    count, changed = sum(prod(shape_of(weight)) for _, weight in trained), 0
    with Checkpoint(model.name_or_path) as checkpoint:
        if checkpoint.dtypes <= {trained[0][1].dtype}:
            return
        for _, named in groupby(trained, key=lambda named: layer_of(named[0])):
            layer = dict(named)
            for name, value in layer_in_files(model, layer, checkpoint).items():
                if not value.isnan().any():
                    set_copy(layer[name], value, copies)
                    changed += value.numel()
    log.info("DeepSpeed's float32 copy: %.1f %% of its weights are those of %s, unrounded", 100 * changed / count,
             model.name_or_path)  # fmt: skip


def layer_in_files(model: PreTrainedModel, layer: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The values that a checkpoint's files have for some weights of a model, float32 by name; NaN what they do not hold.

    Transformers renames tensors when it loads them and joins those of a layer's experts. Where each number goes, the way back
    says: it is applied to the numbers' places.
    """
    shapes = {name: shape_of(weight) for name, weight in layer.items()}
    values = torch.full((sum(map(prod, shapes.values())),), torch.nan)
    places, parts, begin = {}, {}, 0
    for name, shape in shapes.items():
        end = begin + prod(shape)
        places[name] = torch.arange(begin, end, dtype=torch.int32).view(shape)
        parts[name] = values[begin:end].view(shape)
        begin = end
    for name, where in revert_weight_conversion(model, places).items():
        tensor = checkpoint.tensor(name)
        if tensor is None or tensor.shape != where.shape:
            continue
        if name in parts:
            parts[name].copy_(tensor)
        else:
            values[where.flatten().long()] = tensor.flatten().float()
    return parts


def set_copy(weight: nn.Parameter, value: Tensor, copies: Mapping[int, Tensor]) -> None:
    """Set the float32 copy of a weight, or this process's part of it; `value` is the whole, float32 on the CPU."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(weight, "ds_id"):  # ZeRO-3; DeepSpeed's own cutting takes no weights that the processes share unevenly
        size = weight.ds_tensor.numel()
        padded = torch.zeros(size * weight.ds_zero_partition_world_size)
        padded[: value.numel()] = value.flatten()
        safe_set_local_fp32_param(weight, padded[weight.ds_zero_partition_rank * size :][:size])
    elif id(weight) in copies:
        copies[id(weight)].copy_(value)
    else:
        safe_set_full_fp32_param(weight, value)


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a weight, also where ZeRO-3 has spread it."""
    return getattr(weight, "ds_shape", weight.shape)
