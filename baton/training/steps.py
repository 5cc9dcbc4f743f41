"""An optimizer step as one batch: every process trains its share of it row by row, forward and backward.

The settings of the batch say how many members the global batch has, and nothing else: neither the number of processes nor how
the batch is split decides what is in a step, or its loss. `StepSampler` deals a step's members to processes and rows by what
they cost (`dealing.py`), `TrainsRowByRow` trains them. The loss that balances a router is the one that depends on rows.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from accelerate.utils import DistributedType, is_peft_model
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler
from transformers.trainer_utils import seed_worker

from baton.errors import InputError
from baton.models.router import balance_of
from baton.parallel import DataParallel, data_parallel
from baton.training.arguments import Compile
from baton.training.compiling import compile_where_it_pays
from baton.training.dealing import deal, model_size, rows_of_shares
from baton.training.memory import sharding_of

log = logging.getLogger("baton")


class Row(NamedTuple):
    """Members of one forward and backward pass, as indices of the dataset, and by what its numbers count in the step.

    `shares` has for each amount (such as pairs, or tokens) the row's part of all that the step has of it, times the number of
    processes, which gradients are averaged over. All are 0 in a row that changes nothing.
    """

    members: list[int]
    shares: dict[str, float]


class StepSampler(BatchSampler):
    """Yields for each optimizer step this process's rows, equally many in every process.

    Args:
        order: the members' order in an epoch, the same in every process.
        size: members of a step.
        costs: of each member, in any unit.
        tokens: of each member in a row.
        amounts: by name, of each member: what numbers are means over. (N,) each, as all the above.
        tokens_per_row: most tokens of a row; None: each process's share is one row.
        drop_last: whether an incomplete last step is left out.
        process: whose share it is.
    """

    def __init__(
        self,
        order: Sampler[int],
        size: int,
        costs: np.ndarray,
        tokens: np.ndarray,
        amounts: Mapping[str, np.ndarray],
        tokens_per_row: int | None,
        drop_last: bool,
        process: DataParallel,
    ):
        super().__init__(order, size, drop_last)
        self.costs, self.tokens, self.amounts = costs, tokens, amounts
        self.tokens_per_row, self.process = tokens_per_row, process

    def __iter__(self) -> Iterator[list[Row]]:
        for members in super().__iter__():
            yield self._own_rows(np.array(members))

    def _own_rows(self, members: np.ndarray) -> list[Row]:
        costs = self.costs[members].tolist()
        shares = deal(costs, self.process.size)
        rows = rows_of_shares(shares, self.tokens[members].tolist(), self.tokens_per_row)[self.process.rank]
        wholes = {name: amounts[members].sum() / self.process.size for name, amounts in self.amounts.items()}
        cheapest = [int(members[np.argmin(costs)])]  # to fill with
        return [Row(members[row].tolist() or cheapest, self._shares(members[row], wholes)) for row in rows]

    def _shares(self, members: np.ndarray, wholes: Mapping[str, float]) -> dict[str, float]:
        return {name: float(self.amounts[name][members].sum() / whole) if whole else 0.0 for name, whole in wholes.items()}


class Rows(torch.utils.data.Dataset):
    """A dataset whose index is a `Row`: its members as the trainer's collator makes them a batch, with the row's `shares`."""

    def __init__(self, members: Dataset, collate: Callable[[list[dict]], dict[str, Any]]):
        self.members, self.collate = members, collate

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: Row) -> dict[str, Any]:
        return {**self.collate(self.members.__getitems__(row.members)), "shares": row.shares}


def step_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of a step as the one batch that Transformers' Trainer sees of it."""
    return {"rows": rows}


class TrainsRowByRow:
    """TRL's trainers with an optimizer step as one batch, for a class before theirs, once `train_row_by_row` is called.

    Their `compute_loss` has to give a mean over `mean_over`, and is called for each row; so are their metrics, which are then
    those of the step. `shares_of_metrics` names the amount that a metric is a mean over, where it is not `mean_over`.
    """

    mean_over: str
    shares_of_metrics: ClassVar[Mapping[str, str]] = {}
    _steps: StepSampler | None = None

    def train_row_by_row(
        self, costs: np.ndarray, tokens: np.ndarray, amounts: Mapping[str, np.ndarray], tokens_per_row: int | None
    ) -> None:
        """Have each step computed in rows; arguments as in `StepSampler`, of the rows of `train_dataset`."""
        args, process = self.args, data_parallel()
        order: Sampler[int] = SequentialSampler(self.train_dataset)
        if args.train_sampling_strategy != "sequential":
            order = SeedableRandomSampler(self.train_dataset, data_seed=args.seed if args.data_seed is None else args.data_seed)
        # The Trainer counts batches of all processes, and one of them is a step.
        args.per_device_train_batch_size *= args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        self._train_batch_size = args.per_device_train_batch_size
        size = args.per_device_train_batch_size * process.size
        self._steps = StepSampler(order, size, costs, tokens, amounts, tokens_per_row, args.dataloader_drop_last, process)

    def per_process(self, epoch: float) -> float:
        """One process's share of what the whole training comes to, where an epoch comes to so much."""
        args, processes = self.args, data_parallel().size
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        epochs = args.max_steps * size / len(self.train_dataset) if args.max_steps > 0 else args.num_train_epochs
        return epochs * epoch / processes

    def compile_layers(self, how: Compile, costs: np.ndarray, in_4_bit: bool, balances: bool = False) -> None:
        """Compile the model's layers as `compile_where_it_pays`, where an epoch costs these (`tree_costs`).

        With `balances` the router's numbers are read inside of layers, which are then left as they are.
        """
        if balances and how == "on":
            raise InputError("`compile`: on, but the router's loss is computed from inside the layers; set it to auto or off")
        if balances:
            if how == "auto":
                log.info("layers are not compiled: the router's loss is computed from inside them")
            return
        passes = 2 if is_peft_model(self.model) else 3
        flops = passes * 2 * model_size(self.model).body * self.per_process(costs.sum() / 1000)
        compile_where_it_pays(self.model, how, flops, self.args, sharding_of(self.args), in_4_bit)

    def get_train_dataloader(self) -> DataLoader:
        if self._steps is None:
            return super().get_train_dataloader()
        args = self.args
        dataset = self._remove_unused_columns(self.train_dataset, description="Training")
        loader = DataLoader(
            Rows(dataset, self.data_collator),
            batch_sampler=self._steps,
            collate_fn=step_of,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        # "One process": the sampler has divided the steps already.
        how = {"put_on_device": True, "non_blocking": self.accelerator.non_blocking}
        return prepare_data_loader(loader, self.accelerator.device, num_processes=1, process_index=0, **how)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        if "rows" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        self._of_step: dict[str, float] = defaultdict(float)
        tokens_before, loss = self._total_train_tokens, 0.0
        # Autocast keeps its copies of the weights until its outermost context ends: they are made once for all rows.
        with torch.autocast(self.accelerator.device.type, enabled=False):
            for number, row in enumerate(inputs["rows"], 1):
                with self._synchronising(model, last=number == len(inputs["rows"])):
                    loss = loss + super().training_step(model, row)
        self._log_step(tokens_before)
        return loss

    @contextmanager
    def _synchronising(self, model: torch.nn.Module, last: bool) -> Iterator[None]:
        """Context of a row's passes: gradients go to the other processes with the last row.

        DeepSpeed is told by Accelerate. FSDP spreads those of every row, or each process would hold all of them.
        """
        self.accelerator.gradient_state._set_sync_gradients(last)
        spreads = self.is_fsdp_enabled or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with nullcontext() if last or spreads else self.accelerator.no_sync(model):
            yield

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "shares" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        shares = inputs.pop("shares")
        of_steps = self._metrics["train"]
        self._metrics["train"] = of_row = defaultdict(list)
        with _gathers_its_own(self.accelerator):
            loss = self.loss_of_row(model, inputs, shares)
        self._metrics["train"] = of_steps
        of_row["num_tokens"] = [0]
        for name, (value,) in of_row.items():
            self._of_step[name] += value * shares[self.shares_of_metrics.get(name, self.mean_over)]
        if any(shares.values()):
            self._of_step["num_tokens"] += int(inputs["attention_mask"].sum())
        return loss * shares[self.mean_over]

    def loss_of_row(self, model: torch.nn.Module, inputs: dict[str, Any], shares: dict[str, float]) -> torch.Tensor:
        """The mean loss over a row's members, with their metrics in `_metrics["train"]`."""
        return super().compute_loss(model, inputs)

    def _log_step(self, tokens_before: int) -> None:
        """Log what the rows of all processes had, each number by its share."""
        values = torch.tensor(list(self._of_step.values()), dtype=torch.float64, device=self.accelerator.device)
        means = dict(zip(self._of_step, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        self._total_train_tokens = tokens_before + round(means.pop("num_tokens") * data_parallel().size)
        for name, value in means.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(_flat(inputs))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        super()._track_num_input_tokens(_flat(inputs))


def needs_its_own_batches(model: torch.nn.Module, config: Any) -> str | None:
    """Why TRL has to compute a language model's step in batches of its own, whatever the loss, or None where rows can be dealt.

    Args:
        config: a TrainingArguments of TRL's.
    """
    if balances_router(model, config) and balance_of(model.get_base_model() if is_peft_model(model) else model) is None:
        return "the router's loss is not known for packed rows"
    return steps_in_backward(config)


def steps_in_backward(config: Any) -> str | None:
    """Why a step cannot have several backward passes, or None where it can."""
    optimizer = config.optim.value
    return f"optim {optimizer} steps in the backward pass" if "lomo" in optimizer or "layerwise" in optimizer else None


def balances_router(model: torch.nn.Module, config: Any) -> bool:
    """Whether TRL adds the router's loss of a mixture of experts."""
    text = model.config.get_text_config()
    coefficient = config.router_aux_loss_coef
    own = getattr(text, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
    return hasattr(text, "output_router_logits") and own != 0.0


@contextmanager
def _gathers_its_own(accelerator: Any) -> Iterator[None]:
    """Context in which what a trainer gathers of all processes is this one's alone."""
    accelerator.gather = accelerator.gather_for_metrics = lambda values, *_, **__: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def _flat(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a step's rows one after another, for those who count their tokens."""
    if "rows" not in inputs:
        return inputs
    return {name: torch.cat([row[name].flatten() for row in inputs["rows"]]) for name in ("input_ids", "attention_mask")}
