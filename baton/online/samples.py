"""A step's samples as tensors: prompts, K responses to each, and numbers for each response token.

B samples are to G prompts; T is the longest response. A prompt with its samples, a *group*, is one tree of a packed row, and
stays whole: its samples share the prompt's hidden states.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from baton.jsonl import Record
from baton.models.trees import Row, Tokens, pack
from baton.parallel import DataParallel
from baton.training.dealing import ModelSize, deal, rows_of_shares, tree_costs, tree_tokens


@dataclass
class Samples:
    """`prompts` (G) and `responses` (B) of token ids, int32 each; `groups`, int64 (B,), says whose prompt each sample has.

    `mask` bool (B, T) is true on response tokens. `columns` are float32 (B, T): `sampler_logps`, and what passes over the
    models add. `scores` float32 (B,) are the rewards; `stopped` bool (B,): not cut off by length.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    groups: Tensor
    mask: Tensor
    scores: Tensor
    stopped: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Samples":
        """The samples of rollouts: annotated records with `prompt_token_ids`, `response_logps` and all beside them.

        Records are read one by one, and nothing of them is kept as Python's numbers, which take eight times the memory.
        """
        prompts, responses, logps, counts = [], [], [], []
        scores: list[float] = []
        stopped: list[bool] = []
        for record in records:
            prompts.append(np.array(record["prompt_token_ids"], dtype=np.int32))
            responses += [np.array(ids, dtype=np.int32) for ids in record["response_token_ids"]]
            logps += [np.array(of, dtype=np.float32) for of in record["response_logps"]]
            counts.append(len(record["responses"]))
            scores += record["rewards"]
            stopped += [reason == "stop" for reason in record["finish_reasons"]]
        lengths = torch.tensor([len(ids) for ids in responses], dtype=torch.int64)
        samples = cls(
            prompts=prompts,
            responses=responses,
            groups=torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(counts)),
            mask=torch.arange(max(lengths.tolist(), default=0)) < lengths[:, None],
            scores=torch.tensor(scores, dtype=torch.float32),
            stopped=torch.tensor(stopped),
        )
        samples.columns["sampler_logps"] = samples.spread(np.concatenate(logps) if logps else np.empty(0, np.float32))
        return samples

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, int64 (B,)."""
        return self.mask.sum(dim=1)

    def members(self, group: int) -> list[int]:
        """The samples of a group."""
        return torch.nonzero(self.groups == group).flatten().tolist()

    def spread(self, flat: np.ndarray) -> Tensor:
        """Numbers of all response tokens one after another, as float32 (B, T), 0 elsewhere."""
        values = torch.zeros(self.mask.shape, dtype=torch.float32)
        values[self.mask] = torch.as_tensor(flat, dtype=torch.float32)
        return values


@dataclass
class PackedGroups:
    """A packed row of groups, and the samples in it.

    `index` int64 (N,) says which of the row's scored tokens is each response token of the samples, one sample after another:
    equal responses share their tokens in the row. `samples` are indices into the step's samples.
    """

    row: Row
    samples: list[int]
    index: Tensor
    groups: list[int]

    def column(self, values: Tensor, mask: Tensor) -> Tensor:
        """Of (B, T) numbers those of the row's response tokens, (N,)."""
        return values[self.samples][mask[self.samples]]


def packed(samples: Samples, groups: Sequence[int]) -> PackedGroups:
    """One packed row of these groups."""
    members = [member for group in groups for member in samples.members(group)]
    prompts: dict[int, Tokens] = {group: samples.prompts[group].tolist() for group in groups}
    sequences = [(prompts[int(samples.groups[member])], samples.responses[member].tolist()) for member in members]
    (row,), places = pack(sequences, None)
    parts = [torch.arange(place.start, place.start + place.length) for place in places]
    return PackedGroups(row, members, torch.cat(parts), list(groups))


def own_rows(
    samples: Samples, groups: Sequence[int], size: ModelSize, tokens_per_row: int | None, process: DataParallel
) -> list[list[int]]:
    """This process's rows of `groups`, each a list of groups; as many rows in every process, empty ones last.

    Groups are dealt by what they cost, so that all processes end together.
    """
    costs, tokens = [], []
    for group in groups:
        prompt = np.array([len(samples.prompts[group])])
        responses = np.array([[len(samples.responses[member]) for member in samples.members(group)]])
        costs.append(int(tree_costs(prompt, responses, size)[0]))
        tokens.append(int(tree_tokens(prompt, responses)[0]))
    rows = rows_of_shares(deal(costs, process.size), tokens, tokens_per_row)[process.rank]
    return [[groups[place] for place in row] for row in rows]
