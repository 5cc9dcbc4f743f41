"""The loss that balances the router of a mixture of experts, on packed rows: Transformers' own, as on a padded batch.

It is E sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, equations 4 to 6): of E experts, f_e is the share of tokens that
choose e, P_e the mean probability that the router gives to e. A padded batch has a shared prompt once for each sequence, so
here a token counts as often as it stands in the sequences, and padding counts nothing.
"""

import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baton.models.trees import Place, Row

# What the model's own function computes from the logits of each layer, (T, E), and how often each token counts, (T,).
Balance = Callable[[tuple[Tensor, ...], Tensor], Tensor]


def balance_of(model: nn.Module) -> Balance | None:
    """The function of a model, without an adapter's wrapper, that gives its router's loss; None where it is not known."""
    config = model.config.get_text_config()
    files = (sys.modules.get(kind.__module__) for kind in type(model).__mro__)
    function = next((found for file in files if (found := getattr(file, "load_balancing_loss_func", None))), None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    top_k = getattr(config, "num_experts_per_tok", None)
    records = getattr(model.base_model, "_can_record_outputs", None) or {}
    if function is None or not experts or not top_k or "router_logits" not in records:
        return None
    return partial(_call, function, experts, top_k)


def _call(function: Callable, experts: int, top_k: int, logits: tuple[Tensor, ...], counts: Tensor) -> Tensor:
    return function(logits, experts, top_k, counts)


def count_sequences(rows: Sequence[Row], places: Sequence[Place]) -> None:
    """Have the forward pass of `whole` rows keep the router's logits: `row.counts` is how many sequences have each token."""
    starts = []
    for row in rows:
        row.counts = torch.zeros(row.layout.length)
        starts.append([0, *accumulate(prompt + sum(responses) for prompt, responses in row.layout.trees)])
    for place in places:
        row, tree = rows[place.row], bisect_right(starts[place.row], place.last) - 1
        start, prompt = starts[place.row][tree], row.layout.trees[tree][0]
        row.counts[start : start + prompt] += 1
        row.counts[place.last - place.length + 1 : place.last + 1] += 1


def balance_loss(balance: Balance, rows: Sequence[Row]) -> Tensor:
    """The router's loss on rows after their forward pass, a number with gradients."""
    layers = zip(*(row.left.router_logits for row in rows), strict=True)
    logits = tuple(torch.cat([part.flatten(end_dim=-2) for part in layer]) for layer in layers)
    lengths = [len(row.left.router_logits[0].flatten(end_dim=-2)) for row in rows]
    counts = [F.pad(row.counts, (0, length - len(row.counts))) for row, length in zip(rows, lengths, strict=True)]
    return balance(logits, torch.cat(counts).to(logits[0].device))
