"""What a model says of token sequences: rewards, log-probabilities of responses, which of several tokens comes next.

Each function computes sequences, lists of token ids, without gradients: one batch as `batching.batches` cuts them, or packed
rows, which it cuts itself. The last step is in float32 whatever the model's dtype: in bfloat16 it would make ties.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from baton.errors import InputError
from baton.models import forward
from baton.models.batching import padded
from baton.models.trees import Tokens, pack


@torch.inference_mode()
def rewards(model: PreTrainedModel, sequences: list[list[int]]) -> list[float]:
    """Rewards of a Bradley-Terry model, a sequence classifier with one output, read at the end of each sequence."""
    pad = model.config.get_text_config().pad_token_id
    ids, lengths = padded(sequences, pad or 0, model.device)  # (B, L), (B,)
    if not hasattr(model, "score"):  # its layout is unknown, and it may not be causal
        mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
        return model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float().tolist()
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, D)
    last = torch.tensor([_end(sequence, pad) for sequence in sequences], device=model.device)
    states = states[torch.arange(len(sequences), device=model.device), last].float()  # (B, D)
    bias = None if model.score.bias is None else model.score.bias.float()
    return F.linear(states, model.score.weight.float(), bias)[:, 0].tolist()


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
    rows, places = pack(sequences, tokens_per_row)
    members: list[list[int]] = [[] for _ in rows]
    for index, place in enumerate(places):
        members[place.row].append(index)
    for row, indices in zip(rows, members, strict=True):
        logps = forward.logps(model, row).double().cpu()
        for index in indices:
            start = places[index].start
            yield index, logps[start : start + places[index].length].sum().item()


@torch.inference_mode()
def next_token_shares(model: PreTrainedModel, sequences: list[list[int]], tokens: list[int]) -> list[list[float]]:
    """The probability of each of `tokens`, given that it is one of them that follows; a list for each sequence."""
    ids, lengths = padded(sequences, 0, model.device)  # (B, L), (B,)
    places, row_places = torch.unique(lengths - 1, return_inverse=True)  # where the answers are predicted
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits  # (B, places, vocabulary)
    rows = torch.arange(len(sequences), device=model.device)
    return logits[rows, row_places][:, tokens].float().softmax(-1).tolist()


def _end(sequence: list[int], pad: int | None) -> int:
    """Where transformers reads the reward: the last token that is not the padding token, should a response end with it."""
    return next((place for place in range(len(sequence) - 1, -1, -1) if sequence[place] != pad), 0)
