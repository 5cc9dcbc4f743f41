"""Passes over a step's samples: what models say of them, and optimizer steps, on any number of processes.

Groups are dealt to processes and rows by what they cost (`samples.own_rows`); every row has a forward and backward pass of its
own. What a loss divides by are counts over all processes, so that the number of processes changes nothing but rounding.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from baton.models.trees import Row
from baton.online.models import Models, Scored, plain
from baton.online.samples import PackedGroups, Samples, own_rows, packed
from baton.parallel import data_parallel
from baton.training.dealing import model_size
from baton.training.metrics import forward_flops, weights_of

# Of a packed row: its part of the loss, where the parts of all rows of all processes add up to the loss; and of metrics.
LossOfRow = Callable[[Scored, PackedGroups], tuple[Tensor, dict[str, Tensor]]]
ACTOR = 0  # the optimizer's group of its weights


class Learner:
    """Models under an accelerator, and their optimizer.

    Args:
        models: not prepared yet.
        optimizer: of their weights; each of its groups has an `initial_lr`.
        factor: the learning rate of a step as a share of `initial_lr`, by the number of the step, from 0, and of the group;
            the steps that left the actor frozen are not counted for it.
        tokens_per_row: most tokens of a packed row, but for a group that alone is longer.
        max_grad_norm: of all gradients together; 0: they are not clipped.
    """

    def __init__(
        self,
        models: Models,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        factor: Callable[[int, int], float],
        tokens_per_row: int,
        max_grad_norm: float,
    ):
        self.size, self.weights = model_size(models.actor), weights_of(plain(models.actor))
        self.model, self.optimizer = accelerator.prepare(models, optimizer)
        self.accelerator, self.factor = accelerator, factor
        self.tokens_per_row, self.max_grad_norm = tokens_per_row, max_grad_norm
        self.updates = self.frozen_updates = 0  # optimizer steps; those of them that left the actor as it was
        self.flops = self.seconds = 0.0  # of matrix products that these passes needed, by this process

    @property
    def models(self) -> Models:
        """The models without what an accelerator wraps around them."""
        return self.accelerator.unwrap_model(self.model)

    @torch.no_grad()
    def score(self, samples: Samples, function: Callable[[Row], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `function` says of each response token, float32 (B, T) each, in every process.

        `function` takes a row and returns (N,) for its scored tokens; it is called equally often in all processes.
        """
        begun = time.perf_counter()
        found: dict[str, Tensor] = {}
        self.model.eval()
        for row, fills in self._rows(samples, range(len(samples.prompts))):
            for name, flat in function(row.row).items():
                column = found.setdefault(name, torch.zeros(samples.mask.shape, dtype=torch.float32))
                if not fills:
                    lengths = samples.lengths[row.samples].tolist()
                    for sample, part in zip(row.samples, flat.float().cpu()[row.index].split(lengths), strict=True):
                        column[sample, : len(part)] = part
        self.seconds += time.perf_counter() - begun
        return {name: self._summed(column) for name, column in found.items()}

    def own_scores(self, samples: Samples, of_actor: bool) -> dict[str, Tensor]:
        """`logps` where `of_actor`, and `values` where there is a critic, of the models as they are."""

        def scored(row: Row) -> dict[str, Tensor]:
            self.count(row, passes=int(of_actor))
            said = self.model(row, of_actor=of_actor)
            return {name: value for name, value in said._asdict().items() if value is not None and name != "entropy"}

        return self.score(samples, scored)

    def update(self, parts: Sequence[tuple[Samples, Sequence[int], LossOfRow]], frozen_actor: bool = False) -> dict[str, float]:
        """One optimizer step on the sum of the losses of each part's groups; returns their metrics, with `grad_norm`.

        With `frozen_actor` the actor stays as it is, and its learning rate's schedule where it was.
        """
        begun = time.perf_counter()
        self.model.train()
        for number, group in enumerate(self.optimizer.param_groups):
            frozen = frozen_actor and number == ACTOR
            counted = self.updates - (self.frozen_updates if number == ACTOR else 0)
            group["lr"] = 0.0 if frozen else group["initial_lr"] * self.factor(counted, number)
        metrics: dict[str, float] = defaultdict(float)
        rows = [(*row, loss) for samples, groups, loss in parts for row in self._rows(samples, groups)]
        # Autocast keeps its copies of the weights until its outermost context ends: they are made once for all rows.
        with torch.autocast(self.accelerator.device.type, enabled=False):
            for number, (row, fills, loss_of_row) in enumerate(rows, 1):
                with self._synchronising(last=number == len(rows)):
                    said = self.model(row.row)
                    index = row.index.to(self.accelerator.device)
                    at_tokens = Scored(*(None if value is None else value[index] for value in said))
                    loss, of_row = loss_of_row(at_tokens, row)
                    # Gradients are averaged over the processes, and the loss is a sum over them.
                    self.accelerator.backward(loss * (0.0 if fills else data_parallel().size))
                self.count(row.row, passes=0 if fills else 3)
                for name, value in {"loss": loss, **of_row}.items():
                    metrics[name] += 0.0 if fills else float(value.detach())
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self.frozen_updates += frozen_actor
        self.seconds += time.perf_counter() - begun
        return {**self._sums(metrics), "grad_norm": norm}

    def move_optimizer(self, device: torch.device | str) -> None:
        """Move the optimizer's states, and give back what is free, to leave a GPU's memory to others.

        Under DeepSpeed the states stay. Everywhere a weight's number of steps does: AdamW has it on the CPU, and would have to
        wait for a GPU to read it there.
        """
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            for state in self.optimizer.state.values():
                moved = {name: value.to(device) for name, value in state.items() if torch.is_tensor(value) and name != "step"}
                state.update(moved)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def taken(self) -> tuple[float, float]:
        """Operations of all processes and seconds of this one since the last call."""
        flops, seconds = self._sums({"flops": self.flops})["flops"], self.seconds
        self.flops = self.seconds = 0.0
        return flops, seconds

    def _rows(self, samples: Samples, groups: Sequence[int]) -> Iterator[tuple[PackedGroups, bool]]:
        """This process's rows, each with whether it only fills: every process has equally many."""
        for row in own_rows(samples, list(groups), self.size, self.tokens_per_row, data_parallel()):
            yield packed(samples, row or [groups[0]]), not row

    def _clip(self) -> float:
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm or float("inf"))
        return 0.0 if norm is None else float(norm)

    @contextlib.contextmanager
    def _synchronising(self, last: bool) -> Iterator[None]:
        """Context of a row's passes: gradients go to the other processes with the last row, under FSDP with every one."""
        self.accelerator.gradient_state._set_sync_gradients(last)
        kinds = (DistributedType.DEEPSPEED, DistributedType.FSDP)
        spreads = self.accelerator.distributed_type in kinds
        with contextlib.nullcontext() if last or spreads else self.accelerator.no_sync(self.model):
            yield

    def count(self, row: Row, passes: int) -> None:
        """Count the operations of so many forward passes of the actor; the critic is taken to be as large, without its head."""
        tokens, scored = row.layout.length, len(row.targets)
        self.flops += passes * forward_flops(self.weights, tokens, scored)
        if self.models.critic is not None:
            self.flops += max(passes, 1) * forward_flops((self.weights[0], 0), tokens, 0)

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def _sums(self, values: dict[str, float]) -> dict[str, float]:
        names = sorted(values)  # in one order in all processes, which have the same names
        summed = self._summed(torch.tensor([values[name] for name in names], dtype=torch.float64)).tolist()
        return dict(zip(names, summed, strict=True))


def optimizer_of(models: Models, learning_rate: float, critic_learning_rate: float, **settings: Any) -> torch.optim.Optimizer:
    """AdamW of the trained weights: of the actor, and of the critic at a learning rate of its own."""
    parts: list[tuple[nn.Module | None, float]] = [(models.actor, learning_rate), (models.critic, critic_learning_rate)]
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate, "initial_lr": rate}
        for model, rate in parts
        if model is not None
    ]
    return torch.optim.AdamW(groups, **settings)
