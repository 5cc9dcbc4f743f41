"""The models of an online training as one module: the actor, and the critic where there is one.

One module with two groups of weights is one engine to DDP, DeepSpeed and FSDP, with one optimizer, schedule and checkpoint.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from baton.errors import InputError
from baton.models import forward
from baton.models.attention import NAME
from baton.models.logps import gathered
from baton.models.trees import Row
from baton.training.export import in_checkpoint_format, tensors_of

log = logging.getLogger("baton")


class Scored(NamedTuple):
    """What the models say of a row's N scored tokens, float32 (N,), in nats; None is what was not computed."""

    logps: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None


class Models(nn.Module):
    """`models(row)` scores a packed row. `temperature` is that of the sampling: logits are divided by it."""

    def __init__(self, actor: nn.Module, critic: PreTrainedModel | None = None, temperature: float = 1.0):
        super().__init__()
        self.actor, self.critic, self.temperature = actor, critic, temperature
        # What Accelerate reads of a model: its size, and the layers that FSDP wraps one by one.
        self.config = plain(actor).config
        self._no_split_modules = sorted({name for each in (plain(actor), critic) if each for name in layers_of(each)})

    def tie_weights(self) -> None:
        """Have the parts of each model that share weights share them again, as Accelerate asks for under FSDP."""
        for model in (plain(self.actor), self.critic):
            if model is not None:
                model.tie_weights()

    def forward(self, row: Row, of_actor: bool = True) -> Scored:
        of_critic = None if self.critic is None else values(self.critic, row)
        if not of_actor:
            return Scored(values=of_critic)
        scores = forward.row_scores(plain(self.actor), row, self.temperature)
        return Scored(scores.log_probs, scores.entropy, of_critic)


def plain(model: nn.Module) -> PreTrainedModel:
    """A model without PEFT's wrapper; its adapter's layers stay."""
    return model.get_base_model() if is_peft_model(model) else model


def layers_of(model: PreTrainedModel) -> set[str]:
    """The names of the classes of a model's layers, of which each must stay whole."""
    present = {type(module).__name__ for module in model.modules()}
    return present & set(model._no_split_modules or ())


def values(critic: PreTrainedModel, row: Row) -> Tensor:
    """The critic's value of each state in which a scored token of the row is chosen, float32 (N,)."""
    states = forward.hidden_states(critic, row, row.predictors)
    weight, bias = critic.score.weight, getattr(critic.score, "bias", None)
    with gathered(weight, bias):
        weight, bias = (part.full_tensor() if isinstance(part, DTensor) else part for part in (weight, bias))
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.float(), weight.float(), None if bias is None else bias.float())[:, 0]


def load_actor(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model for packed rows. Raises InputError where its architecture cannot take them."""
    return _for_rows(AutoModelForCausalLM.from_pretrained(model, dtype=dtype), model)


def load_critic(model: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A critic: a reward model, or a model of another kind with a new head of zeros. `seed` counts for nothing but its loading.

    Raises InputError where its architecture cannot take packed rows.
    """
    torch.manual_seed(seed)
    critic, loaded = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=dtype, output_loading_info=True
    )
    if any(name.startswith("score") for name in loaded["missing_keys"]):
        log.info("%s: no reward model, so the critic begins with a head of zeros", model)
        with gathered(critic.score.weight, writes=True):
            nn.init.zeros_(critic.score.weight)  # a value of 0 everywhere: a random one would be taken for rewards
    return _for_rows(critic, model)


def _for_rows(model: PreTrainedModel, name: str) -> PreTrainedModel:
    if reason := forward.obstacle(model):
        raise InputError(f"{name}: {type(model).__name__} cannot be trained in packed rows: {reason}")
    model.config._attn_implementation = NAME
    model.config.use_cache = False
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # the policy that is trained is the one that sampled
    return model


@torch.no_grad()
def weights_for_servers(actor: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the actor's tensors whole, by the names that checkpoints have; adapters merged. All processes have to take them."""
    if is_peft_model(actor):
        yield from in_checkpoint_format(plain(actor), merged(actor))
    else:
        yield from in_checkpoint_format(actor, tensors_of(actor))


def merged(actor: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model with LoRA's updates added, by their names in the model without an adapter."""
    layers = {name: module for name, module in plain(actor).named_modules() if hasattr(module, "get_delta_weight")}
    seen = set()
    for name, tensor in plain(actor).state_dict(keep_vars=True).items():
        layer, _, rest = name.partition(".base_layer.")
        if ".lora_" in name or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if rest == "weight" and layer in layers:
            (adapter,) = layers[layer].active_adapters
            yield f"{layer}.weight", tensor.detach().float() + layers[layer].get_delta_weight(adapter).float()
        else:
            yield name.replace(".base_layer.", "."), tensor.detach()


def same_tokens(actor: Any, other: Any) -> str | None:
    """In what two tokenizers differ so that the actor's token ids mean something else to the other, or None.

    The other may have more tokens, such as one for padding that a reward model was given.
    """
    ours, theirs = actor.get_vocab(), other.get_vocab()
    different = next((token for token, number in ours.items() if theirs.get(token) != number), None)
    return None if different is None else f"token {different!r} is {ours[different]} and {theirs.get(different)}"
