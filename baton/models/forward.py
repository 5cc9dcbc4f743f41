"""A causal language model's forward pass on packed trees: tokens in, log-probabilities of responses out.

`share_prefixes(model)` gives `model.forward(…, labels=…, fused_lm_head=True)` the meaning that TRL's trainers
give it (per-token log-probabilities where `labels` is not -100), computed from packed rows. Every other call
is untouched.
"""

import types
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from baton.errors import InputError
from baton.models.attention import NAME, padded_length
from baton.models.logps import TokenScores, token_logps, token_scores
from baton.models.router import balance_loss, balance_of, count_sequences
from baton.models.trees import Place, Row, Tokens, distinct_tokens, pack
from baton.parallel import data_parallel

T = TypeVar("T")

# Tokens of one row: enough for full-speed matrix products, few enough for a CPU's caches. GPUs like more.
TOKENS_PER_ROW = 4096


@dataclass
class ScoredTokens(ModelOutput):
    """`TokenScores` of every next-token label, (batch, length - 1), zero where the label is -100."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None  # of a mixture of experts, where `output_router_logits` asks for it


@dataclass
class TokenCounts:
    """What the last packed forward pass came to: tokens that it needed at least, tokens computed with repeats and padding."""

    needed: int = 0
    computed: int = 0


def share_prefixes(model: PreTrainedModel, tokens_per_row: int | None = TOKENS_PER_ROW) -> TokenCounts:
    """Make `model(input_ids, attention_mask, labels=…, fused_lm_head=True)` a packed forward pass, in place.

    The inputs are a right-padded batch as TRL's collator makes it: int64 (B, L) each, `labels` -100 on
    prompts and padding. The result is `ScoredTokens`, equal to the unpacked forward pass in value and
    gradient. Calls without `fused_lm_head`, generation among them, run the model's own forward with its own
    attention.

    Args:
        model: the causal language model itself (inside PEFT's or DDP's wrapper, before FSDP or ZeRO shard
            it).
        tokens_per_row: most tokens of a row; rows run one after another. None: one row. So it is in training, where several
            would be kept for the backward pass all the same, and where the data is divided among several processes, since
            sharded models need the same number of forward passes in each.
    Returns:
        counts that each packed forward pass sets anew.
    Raises:
        ValueError: the architecture cannot take packed trees (`obstacle` says why).
    """
    reason = obstacle(model)
    if reason:
        raise ValueError(f"{type(model).__name__} cannot take packed trees: {reason}")
    own_forward, own_attention = model.forward, model.config._attn_implementation
    counts, balance = TokenCounts(), balance_of(model)

    def forward(self, *args, fused_lm_head=False, **kwargs):
        balanced = kwargs.get("output_router_logits")
        if fused_lm_head and (balance is not None or not balanced):
            sequences = sequences_of(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"])
            most = None if self.training or data_parallel().size > 1 else tokens_per_row
            rows, places = pack(sequences, most, whole=bool(balanced))
            if balanced:
                count_sequences(rows, places)
            counts.needed = distinct_tokens(sequences)
            device = computes_on(self)
            counts.computed = sum(row.layout.length + _padding(row, device) for row in rows)
            scored = _unpack(kwargs["labels"], *_score_rows(self, rows, places))
            if balanced:
                scored["aux_loss"] = balance_loss(balance, rows)
            return scored
        with attention(self, own_attention):
            return own_forward(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **kwargs)

    # Set for good, not only during the forward pass: gradient checkpointing runs layers again in the
    # backward.
    model.config._attn_implementation = NAME
    model.forward = types.MethodType(forward, model)
    return counts


@contextmanager
def attention(model: PreTrainedModel, name: str):
    """Context in which a model's layers use the attention implementation `name`."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot take packed trees, or None where it can."""
    config = model.config
    if config.get_text_config() is not config:
        return "it is multimodal"
    # A configuration file may hold an `is_decoder` that its class knows nothing of.
    encoder = hasattr(type(config), "is_decoder") and not config.is_decoder
    if config.is_encoder_decoder or encoder or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if not model._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers other than full and sliding-window attention: {', '.join(sorted(others))}"
    if _limited_by_mask(config):
        return "its attention is limited by its mask alone, which packed rows do without"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    if getattr(config, "kv_lora_rank", None):
        return "its attention is latent (MLA): values are narrower than queries"
    if any("sinks" in name for name, _ in model.named_parameters()):
        return "it has attention sinks"
    if any(getattr(config, name, None) is not None for name in ("output_multiplier", "lm_head_multiplier")):
        return "it scales its logits in a way of its own"
    if config.model_type == "nemotron":
        return "its layers do not pass on to their attention where the trees lie"
    if between := _between_body_and_head(model):
        return f"it has weights between its body and its head: {between}"
    return None


def _limited_by_mask(config) -> bool:
    """Whether transformers says what tokens see in a mask alone: Doge learns it, two families do not pass on their window."""
    if config.model_type == "doge":
        return True
    window = config.sliding_window if config.model_type in ("phimoe", "qwen2_moe") else None
    return bool(window) and window < config.max_position_embeddings


def _between_body_and_head(model: PreTrainedModel) -> str | None:
    """The name of a weight of a language model that is neither in its body nor in its head; None where there is none."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    known = {id(weight) for part in (model.base_model, head) for weight in part.parameters()}
    return next((name for name, weight in model.named_parameters() if id(weight) not in known), None)


def score(
    model: PreTrainedModel, sequences: Sequence[tuple[Tokens, Tokens]], tokens_per_row: int | None
) -> tuple[TokenScores, list[slice]]:
    """Score the responses of `(prompt, response)` token sequences; the attention must be `attention.NAME`.

    Returns:
        the scores of all distinct response tokens in one flat batch, and each sequence's slice of it.
    """
    return _score_rows(model, *pack(sequences, tokens_per_row))


def _score_rows(model: PreTrainedModel, rows: list[Row], places: list[Place]) -> tuple[TokenScores, list[slice]]:
    hidden = torch.cat([_hidden(model, row) for row in rows])
    targets = torch.cat([row.targets for row in rows])
    scores = from_hidden(token_scores, model, hidden, targets)
    row_start = [0]
    for row in rows:
        row_start.append(row_start[-1] + len(row.targets))
    return scores, [_slice(place, row_start) for place in places]


def row_scores(model: PreTrainedModel, row: Row, temperature: float = 1.0) -> TokenScores:
    """Scores of the row's N scored tokens, with gradients; the attention must be `attention.NAME`.

    At a `temperature` other than 1 they are those of the distribution that is sampled from at that temperature.
    """
    return from_hidden(token_scores, model, _hidden(model, row), row.targets, temperature)


def logps(model: PreTrainedModel, row: Row, temperature: float = 1.0) -> Tensor:
    """ln p of the row's N scored tokens, float32 (N,), without gradients; the attention must be `attention.NAME`."""
    with torch.no_grad():
        return from_hidden(token_logps, model, _hidden(model, row), row.targets, temperature)


def from_hidden(
    function: Callable[..., T], model: PreTrainedModel, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> T:
    """`token_scores` or `token_logps` of last hidden states (N, H) under the model's head."""
    head, config = model.get_output_embeddings(), model.config
    # Under FSDP2 the head may be sharded here
    weight, bias = (part.full_tensor() if isinstance(part, DTensor) else part for part in (head.weight, head.bias))
    softcap = getattr(config, "final_logit_softcapping", None)
    return function(
        hidden.to(weight.device),
        weight,
        bias,
        targets.to(weight.device),
        # softcap * tanh(z / softcap) / t = (softcap / t) * tanh((z / t) / (softcap / t))
        scale=_logit_scale(config) / temperature,
        softcap=None if softcap is None else softcap / temperature,
    )


def _slice(place: Place, row_start: list[int]) -> slice:
    start = row_start[place.row] + place.start
    return slice(start, start + place.length)


def _hidden(model: PreTrainedModel, row: Row) -> Tensor:
    """Last hidden states (N, H) that predict the row's N scored tokens."""
    return hidden_states(model, row, row.predictors)


def hidden_states(model: PreTrainedModel, row: Row, at: Tensor) -> Tensor:
    """Last hidden states (N, H) at the tokens `at` of the row, int64 (N,); the attention must be `attention.NAME`.

    Raises InputError where a sequence is so long that the other sequences of its row would be computed otherwise.
    """
    limit = longest_alike(model.config)
    if limit is not None and (longest := max(prompt + max(parts, default=0) for prompt, parts in row.layout.trees)) > limit:
        raise InputError(
            f"a sequence of {longest} tokens: where one has more than {limit}, {type(model).__name__} turns the positions of "
            f"all sequences in its row otherwise (its `rope_type`); cut texts to {limit} tokens (`max_length`)"
        )
    device = computes_on(model)
    padding = _padding(row, device)
    input_ids, position_ids = (
        torch.nn.functional.pad(ids, (0, padding)).to(device, non_blocking=True)[None]
        for ids in (row.input_ids, row.position_ids)
    )
    more = {} if row.counts is None else {"output_router_logits": True}
    outputs = model.base_model(input_ids=input_ids, position_ids=position_ids, layout=row.layout, use_cache=False, **more)
    if row.counts is not None:
        row.left.router_logits = outputs.router_logits
    states = outputs.last_hidden_state[0]  # (T, H)
    return states[at.to(states.device, non_blocking=True)]


def longest_alike(config) -> int | None:
    """The tokens of the longest sequence whose row computes all its positions as any shorter one; None: there is no longest.

    The rotary embeddings `longrope` and `dynamic` choose their frequencies by the last position of a forward pass.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    limits = []
    for of_layers in (parameters, *(part for part in parameters.values() if isinstance(part, dict))):
        if of_layers.get("rope_type") == "longrope":
            limits.append(of_layers["original_max_position_embeddings"])
        elif of_layers.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def computes_on(model: PreTrainedModel) -> torch.device:
    """The device that a model computes on; FSDP may keep its weights in the machine's memory meanwhile."""
    weight = next(model.parameters())
    if isinstance(weight, DTensor) and weight.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def _padding(row: Row, device: torch.device) -> int:
    return padded_length(row.layout.length) - row.layout.length if device.type == "cuda" else 0


def _logit_scale(config) -> float:
    """Factor on the logits: Cohere and HyperCLOVA X multiply them, Granite divides them."""
    if getattr(config, "logit_scale", None) is not None:
        return config.logit_scale
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def sequences_of(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[tuple[list[int], list[int]]]:
    """Cut each row of a right-padded batch at its first label; the first token always counts as prompt."""
    lengths = attention_mask.sum(dim=1)
    # (B,) position of the first label; the length where there is none
    first = torch.where(labels != -100, torch.arange(labels.shape[1], device=labels.device), lengths[:, None])
    starts = first.amin(dim=1).clamp(min=1)
    ids, ends, starts = input_ids.tolist(), lengths.tolist(), starts.tolist()
    return [(row[:start], row[start:end]) for row, start, end in zip(ids, starts, ends, strict=True)]


def _unpack(labels: Tensor, scores: TokenScores, slices: list[slice]) -> ScoredTokens:
    """Flat scores as a batch of TRL's shape, (B, L - 1)."""
    scored = labels[:, 1:] != -100
    source = torch.cat([torch.arange(part.start, part.stop) for part in slices]).to(labels.device)
    return ScoredTokens(*(values.new_zeros(scored.shape).masked_scatter(scored, values[source]) for values in scores))
