"""NEFTune on packed rows: noise on the embeddings of what is trained on (Jain et al., 2023, arXiv 2310.05914)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baton.models.trees import Layout


class Noise:
    """Adds to each number of an embedding uniform noise from -alpha / sqrt(L d) to that (Algorithm 1), while the model trains.

    d is the width, L the tokens of the conversation. In a padded batch, for which Transformers has the same, L is the length of
    the longest. Conversations that begin with one prompt are one tree of the row, and L counts the tree.

    Args:
        embeddings: the model's input embeddings.
    """

    def __init__(self, embeddings: nn.Module, alpha: float):
        self.alpha = alpha
        self.layout: Layout | None = None  # of the row that comes next
        embeddings.register_forward_hook(self._added)

    def _added(self, embeddings: nn.Module, _: Any, output: Tensor) -> Tensor:
        """Embeddings (1, T, d) of a row's tokens, and of padding, with noise."""
        if not embeddings.training or self.layout is None:
            return output
        lengths = torch.tensor([prompt + sum(responses) for prompt, responses in self.layout.trees])
        of_tokens = lengths.repeat_interleave(lengths)
        of_tokens = F.pad(of_tokens, (0, output.shape[1] - len(of_tokens)), value=1).to(output.device)
        most = self.alpha / (of_tokens * output.shape[2]).sqrt()  # (T,)
        return output + ((2 * torch.rand_like(output) - 1) * most[None, :, None]).to(output.dtype)
