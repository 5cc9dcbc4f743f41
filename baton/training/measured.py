"""Trainers with a loss of their own on packed rows: in training row by row, and in evaluation over rows that are held out."""

import logging
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from baton.errors import InputError
from baton.models.forward import row_scores, share_prefixes
from baton.models.logps import TokenScores
from baton.models.router import Balance, balance_loss, balance_of
from baton.models.trees import Row
from baton.parallel import data_parallel
from baton.training.arguments import Compile
from baton.training.checks import check_packing
from baton.training.dealing import deal, model_size, rows_of_shares, tree_costs, tree_tokens
from baton.training.learnt import Outline
from baton.training.steps import TrainsRowByRow

log = logging.getLogger("baton")


class HeldOut(NamedTuple):
    """What `eval_dataset` costs and takes, (N,) each as in `StepSampler`, and what makes some of its members a batch."""

    costs: np.ndarray
    tokens: np.ndarray
    tokens_per_row: int
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]


class MeasuresRows(TrainsRowByRow):
    """One of TRL's trainers whose loss of a row is its own `measure`, for a class before TRL's.

    Without `train_row_by_row` it is TRL's as it is. As it stands here it learns rows of `learnt.collate`, and its numbers are
    means over learnt tokens; another one replaces `check_row` and `evaluation_loop`.
    """

    mean_over = "tokens"
    shares_of_metrics: ClassVar = {"aux_loss": "router_tokens"}
    _balance: Balance | None = None
    remedy = ""  # ends the message where packed numbers are not the model's own
    checks_next_row = False
    held_out: HeldOut | None = None

    def measure(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a packed row, and the means of what is logged."""
        raise NotImplementedError

    def check_row(self, model: Any, inputs: dict[str, Any]) -> None:
        """Raise InputError where the packed numbers of a row are not those of the model's own forward pass."""
        from_first = ((inputs["labels"] != -100).cumsum(dim=1) > 0) & (inputs["attention_mask"] > 0)
        check_packing(self, model, {**inputs, "completion_mask": from_first.long()}, self.remedy)

    def check_first_row(self, wanted: bool | None) -> None:
        """Have the first row checked; None: on a GPU, whose kernels no test has seen."""
        self.checks_next_row = self.accelerator.device.type == "cuda" if wanted is None else wanted

    def stay_padded(self, model: PreTrainedModel, reason: str, how: Compile) -> None:
        """Say why this is TRL's trainer on padded batches. Raises InputError where layers shall be compiled all the same."""
        log.warning("%s: %s, so batches are padded (TRL's own forward pass)", type(model).__name__, reason)
        if how == "on":
            raise InputError("`compile`: on, but this model's batches are padded, which is not compiled; leave it out")

    def balance_router(self, model: PreTrainedModel, coefficient: float) -> None:
        """Have steps add so many times the router's loss of a mixture of experts, `model` without an adapter's wrapper.

        To be called before `train_row_by_row`, which then needs the amount `router_tokens`, and rows with `counts`. The loss is
        that of each row's tokens, and a step's the mean by these. Raises InputError where the model's is not known.
        """
        self._balance = balance_of(model)
        if self._balance is None:
            raise InputError(f"`router_aux_loss_coef`: the router's loss of {type(model).__name__} is not known; leave it out")
        self.router_aux_loss_coef = coefficient

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.checks_next_row and "rows" in inputs:
            self.checks_next_row = False
            self.check_row(model, inputs["rows"][0])
        return super().training_step(model, inputs, *args, **kwargs)

    def loss_of_row(self, model: Any, inputs: dict[str, Any], shares: dict[str, float]) -> Tensor:
        loss, metrics = self.measure(model, inputs)
        if self._balance is not None:
            balance = balance_loss(self._balance, [inputs["row"]])
            metrics["aux_loss"] = balance.item()
            if whole := shares[self.mean_over]:  # by which `compute_loss` multiplies
                loss = loss + self.router_aux_loss_coef * shares["router_tokens"] / whole * balance
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        return loss

    def evaluation_rows(self) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Yield this process's rows of `eval_dataset`: its members, and the batch of them.

        There are as many in every process; those without members only fill.
        """
        share, held = data_parallel(), self.held_out
        rows = rows_of_shares(deal(held.costs.tolist(), share.size), held.tokens.tolist(), held.tokens_per_row)[share.rank]
        for members in rows:
            yield members, self._prepare_inputs(held.collate(self.eval_dataset.__getitems__(members or [0])))

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The loss and the metrics as means over all learnt tokens of the held-out rows, each counted once."""
        if self.held_out is None:
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums: dict[str, float] = defaultdict(float)
        self.model_wrapped.eval()
        for members, inputs in self.evaluation_rows():
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, metrics = self.measure(self.model_wrapped, inputs)
            learnt = len(inputs["row"].targets) if members else 0
            for name, value in {"loss": float(loss), **metrics, "tokens": 1.0}.items():
                sums[name] += value * learnt
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.accelerator.device)
        means = dict(zip(sums, self.accelerator.reduce(values, "sum").tolist(), strict=True))
        every = means.pop("tokens")
        found = {f"{metric_key_prefix}_{name}": value / every for name, value in means.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=found, num_samples=len(self.held_out.costs))


def sizes_of(outline: Outline, model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
    """What each row of token ids costs (`tree_costs`), and its tokens in a packed row, int64 (rows,) each."""
    lengths = outline.prompts, outline.responses[:, None]
    return tree_costs(*lengths, model_size(model)), tree_tokens(*lengths)


def take_rows(model: PreTrainedModel) -> None:
    """Make `model(row=…)` give the scores of a packed row's targets, with gradients, in place; see `forward.share_prefixes`.

    Raises ValueError where the architecture cannot take packed rows.
    """
    share_prefixes(model)
    others = model.forward

    def forward(self, *args: Any, row: Row | None = None, **kwargs: Any) -> TokenScores | Any:
        return others(*args, **kwargs) if row is None else row_scores(self, row)

    model.forward = types.MethodType(forward, model)
