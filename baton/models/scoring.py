"""What a model says of token sequences: rewards, log-probabilities of responses, which of several tokens comes next.

Each function computes sequences, lists of token ids, without gradients: one batch as `batching.batches` cuts them, or packed
rows, which it cuts itself. The last step is in float32 whatever the model's dtype: in bfloat16 it would make ties.
"""

import logging
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from baton.errors import InputError
from baton.models import forward
from baton.models.attention import NAME
from baton.models.batching import batches, padded
from baton.models.sequences import Tokens, without_padding
from baton.models.trees import Place, Row, pack

log = logging.getLogger("baton")

# How far packed hidden states are from the model's own at most, for `Packing.difference`. Measured against the model's own
# attention (CPU, tests/models' families, SmolLM2-135M): bfloat16 0.027, float16 0.004, float32 1.5e-6. With an attention that
# sees other trees, or not its prompt, or one token too few of its window: 0.78 and more.
STATE_LIMIT = 0.15


class Packing:
    """Whether a model's sequences are scored in packed rows: where its architecture takes them at any length, and its head is
    `known`.

    On a GPU, whose kernels no test has seen, the first row must also agree with the model's own forward pass; else sequences
    are padded from then on, and the log says so. While it holds, the model's attention is `attention.NAME`.
    """

    def __init__(self, model: PreTrainedModel, known: bool = True):
        self.model, self.own = model, model.config._attn_implementation
        self.holds = known and forward.obstacle(model) is None and forward.longest_alike(model.config) is None
        self.checked = model.device.type != "cuda"
        if self.holds:
            model.config._attn_implementation = NAME

    def agreed(self, sequences: Sequence[tuple[Tokens, Tokens]], tokens_per_row: int) -> bool:
        """Whether it holds, checked with the first row of these `(prompt, response)` where none has been."""
        if self.holds and not self.checked and sequences:
            self.checked = True
            difference = self.difference(sequences, tokens_per_row)
            found = f"the hidden states of the first row differ by {difference:.2g} of their size from the model's own"
            self.holds = difference <= STATE_LIMIT
            if self.holds:
                log.info("%s", found)
            else:
                self.model.config._attn_implementation = self.own
                log.warning("%s; rounding explains %g. Sequences are padded instead of packed", found, STATE_LIMIT)
        return self.holds

    @torch.inference_mode()
    def difference(self, sequences: Sequence[tuple[Tokens, Tokens]], tokens_per_row: int) -> float:
        """How far packed hidden states are from the model's own at the ends of the first row's sequences.

        The length of the difference over that of the model's own, of the sequence with the most: 0 where all are equal, about
        1.4 where they have nothing to do with each other.
        """
        row, indices, places = next(_rows(sequences, tokens_per_row, whole=True))
        packed = _row_ends(self.model, row, places)
        whole = [[*sequences[index][0], *sequences[index][1]] for index in indices]
        own = torch.empty_like(packed)
        with forward.attention(self.model, self.own):
            for batch in batches([len(ids) for ids in whole], tokens_per_row, least_filled=0.8):
                own[batch] = _ends(self.model, [whole[i] for i in batch])
        return ((packed - own).float().norm(dim=1) / own.float().norm(dim=1)).nan_to_num(nan=math.inf).max().item()


@torch.inference_mode()
def rewards(model: PreTrainedModel, sequences: Sequence[Tokens], weights: Sequence[float] | None = None) -> list[float]:
    """Rewards of a Bradley-Terry model, a sequence classifier, read at the end of each sequence.

    They are its first output, or the sum of its outputs by `weights`, one for each.
    """
    if not hasattr(model, "score"):  # its layout is unknown, and it may not be causal
        ids, lengths = padded(sequences, model.config.get_text_config().pad_token_id or 0, model.device)  # (B, L), (B,)
        mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
        return _summed(model(input_ids=ids, attention_mask=mask.long()).logits.float(), weights).tolist()
    return _summed(_outputs_of(model, _ends(model, [read_part(model, ids) for ids in sequences])), weights).tolist()


@torch.inference_mode()
def packed_rewards(
    model: PreTrainedModel,
    sequences: Sequence[tuple[Tokens, Tokens]],
    tokens_per_row: int,
    weights: Sequence[float] | None = None,
) -> Iterator[tuple[int, float]]:
    """Yield (index, reward) of each `(prompt, response)` of token ids under a Bradley-Terry model, row after packed row.

    What `rewards` gives for sequences of which `read_part` cuts off nothing, but they share their prompt, and nothing is
    padded. The model must have a `score` head and `attention.NAME` as its attention; rows are as in `trees.pack`, and so is the
    order.
    """
    for row, indices, places in _rows(sequences, tokens_per_row, whole=True):
        outputs = _outputs_of(model, _row_ends(model, row, places))
        yield from zip(indices, _summed(outputs, weights).tolist(), strict=True)


@torch.inference_mode()
def step_probabilities(
    model: PreTrainedModel, sequences: Sequence[Tokens], places: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The probabilities that a process reward model gives at the `places` of each sequence, of one padded batch."""
    ids, _ = padded(sequences, 0, model.device)  # (B, L)
    rows = torch.tensor([number for number, of_one in enumerate(places) for _ in of_one])
    columns = torch.tensor([place for of_one in places for place in of_one])
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[rows, columns]  # (N, H)
    return _divided(_probabilities(model, states), places)


@torch.inference_mode()
def packed_step_probabilities(
    model: PreTrainedModel,
    sequences: Sequence[tuple[Tokens, Tokens]],
    places: Sequence[Sequence[int]],
    tokens_per_row: int,
) -> Iterator[tuple[int, list[float]]]:
    """Yield (index, probabilities) of each `(prompt, response)` of token ids, as `step_probabilities` gives them.

    `places` count from the prompt's first token, and are in the response where there is one. The model must have a `score`
    head and `attention.NAME` as its attention; rows are as in `trees.pack`, and so is the order.
    """
    for row, indices, found in _rows(sequences, tokens_per_row, whole=True):
        of_row = [places[index] for index in indices]
        ends = [place.last - sum(map(len, sequences[index])) + 1 for index, place in zip(indices, found, strict=True)]
        at = torch.tensor([end + place for end, of_one in zip(ends, of_row, strict=True) for place in of_one])
        probabilities = _probabilities(model, forward.hidden_states(model, row, at))
        yield from zip(indices, _divided(probabilities, of_row), strict=True)


@torch.inference_mode()
def custom_rewards(model: PreTrainedModel, sequences: list[list[int]]) -> list[float]:
    """Rewards of a model with its own code, for sequences of one length: its output's `score`, or else its only logit.

    Raises InputError for an output of another number of rewards than sequences.
    """
    ids = torch.tensor(sequences, device=model.device)  # (B, L)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    scores = getattr(output, "score", None)
    scores = output.logits if scores is None else scores
    if scores.numel() != len(sequences):
        raise InputError(
            f"{model.name_or_path}: gives {tuple(scores.shape)} numbers for {len(sequences)} responses; its output needs a "
            "`score`, or a single logit"
        )
    return scores.float().flatten().tolist()


@torch.inference_mode()
def response_logps(model: PreTrainedModel, sequences: list[list[int]], prompts: list[int]) -> list[float]:
    """ln p(response | prompt) under a causal language model, in nats, summed over the response's tokens.

    `prompts` are the numbers of tokens, at least 1 each, that precede the response in each sequence.
    """
    ids, lengths = padded(sequences, 0, model.device)  # (B, L), (B,)
    first = min(prompts) - 1  # a token is predicted at the one before it
    places = torch.arange(first, ids.shape[1] - 1, device=model.device)  # (S,)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits  # (B, S, vocabulary)
    logps = []
    for row, tokens, prompt, length in zip(logits, ids, prompts, lengths.tolist(), strict=True):
        predictions = row[prompt - 1 - first : length - 1 - first].float()  # (response, vocabulary)
        logps.append(-F.cross_entropy(predictions, tokens[prompt:length], reduction="sum").item())
    return logps


@torch.inference_mode()
def packed_response_logps(
    model: PreTrainedModel, sequences: Sequence[tuple[Tokens, Tokens]], tokens_per_row: int
) -> Iterator[tuple[int, float]]:
    """Yield (index, ln p(response | prompt)) of each `(prompt, response)` of token ids, in nats, row after packed row.

    What `response_logps` gives, but responses share their prompt, and nothing is padded. The model must have
    `attention.NAME` as its attention; rows are as in `trees.pack`, and so is the order.
    """
    for row, indices, places in _rows(sequences, tokens_per_row):
        logps = forward.logps(model, row).double().cpu()
        for index, place in zip(indices, places, strict=True):
            yield index, logps[place.start : place.start + place.length].sum().item()


@torch.inference_mode()
def next_token_shares(model: PreTrainedModel, sequences: list[list[int]], tokens: list[int]) -> list[list[float]]:
    """The probability of each of `tokens`, given that it is one of them that follows; a list for each sequence."""
    ids, lengths = padded(sequences, 0, model.device)  # (B, L), (B,)
    places, row_places = torch.unique(lengths - 1, return_inverse=True)  # where the answers are predicted
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits  # (B, places, vocabulary)
    rows = torch.arange(len(sequences), device=model.device)
    return logits[rows, row_places][:, tokens].float().softmax(-1).tolist()


def read_part(model: PreTrainedModel, sequence: Tokens) -> Tokens:
    """What a reward depends on: transformers reads it at the last token that is not the padding token."""
    return without_padding(sequence, model.config.get_text_config().pad_token_id)


def _outputs_of(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The score head on hidden states (N, H), in float32: (N, outputs)."""
    bias = None if model.score.bias is None else model.score.bias.float()
    return F.linear(states.float(), model.score.weight.float(), bias)


def _summed(outputs: Tensor, weights: Sequence[float] | None) -> Tensor:
    """The first of each row's outputs, or their sum by `weights`: (N,)."""
    return outputs[:, 0] if weights is None else outputs @ outputs.new_tensor(weights)


def _probabilities(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The probability of "right" at hidden states (N, H), (N,), whose logit is the model's output."""
    return _outputs_of(model, states)[:, 0].sigmoid()


def _divided(values: Tensor, places: Sequence[Sequence[int]]) -> list[list[float]]:
    """The values of each sequence's places, which stand one after another."""
    return [part.tolist() for part in values.split([len(of_one) for of_one in places])]


def _ends(model: PreTrainedModel, sequences: Sequence[Tokens]) -> Tensor:
    """Hidden states (N, H) at the ends of sequences, by the model's own forward pass on one padded batch."""
    ids, lengths = padded(sequences, 0, model.device)  # (B, L), (B,)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, H)
    return states[torch.arange(len(sequences), device=model.device), lengths - 1]


def _row_ends(model: PreTrainedModel, row: Row, places: list[Place]) -> Tensor:
    """Hidden states (N, H) at the ends of the sequences of a packed row."""
    return forward.hidden_states(model, row, torch.tensor([place.last for place in places]))


def _rows(
    sequences: Sequence[tuple[Tokens, Tokens]], tokens_per_row: int, whole: bool = False
) -> Iterator[tuple[Row, list[int], list[Place]]]:
    """Yield each row of `trees.pack` with its sequences, as indices, and their places."""
    rows, places = pack(sequences, tokens_per_row, whole)
    members: list[list[int]] = [[] for _ in rows]
    for index, place in enumerate(places):
        members[place.row].append(index)
    for row, indices in zip(rows, members, strict=True):
        yield row, indices, [places[index] for index in indices]
