"""TRL's reward trainer with another forward pass, packed trees instead of a padded batch, row by row."""

import logging
import math
import types
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput
from trl import RewardConfig, RewardTrainer

from baton.errors import InputError
from baton.models.attention import NAME
from baton.models.forward import TOKENS_PER_ROW, attention, hidden_states, obstacle
from baton.models.logps import gathered
from baton.models.scoring import STATE_LIMIT
from baton.models.sequences import without_padding
from baton.models.trees import Row
from baton.parallel import model_parallel_size
from baton.training.arguments import Compile
from baton.training.config import train_in_float32
from baton.training.dealing import model_size, tree_costs, tree_tokens
from baton.training.measured import HeldOut, MeasuresRows
from baton.training.sharding import KeepsFloat32
from baton.training.steps import steps_in_backward
from reward_model.packing import Collator, lengths_of

log = logging.getLogger("baton")

HeadInit = Literal["default", "normal"]


class PackedRewardTrainer(MeasuresRows, KeepsFloat32, RewardTrainer):
    """`trl.RewardTrainer` on packed rows in which chosen and rejected share their prompt, a pass for each row.

    Where packed rows do not go (`why_padded`) it is TRL's trainer on padded batches, and the log says so. After an evaluation
    `rewards` are those of `eval_dataset`, of chosen and rejected, float64 (N, 2).

    Args:
        train_dataset, eval_dataset: rows of `chosen_ids` and `rejected_ids`, whole conversations, and perhaps a `margin` that
            the loss takes from their difference.
        tokens_per_row: most tokens of a packed row, unless a single pair has more.
        head_init: what the score head starts from, `set_head`.
        router_aux_loss_coef: weight of the loss that balances the router of a mixture of experts, which TRL's has not.
        compile_layers: whether the layers of packed rows are compiled (`compiling.py`).
        check_first_batch: compare the first row's hidden states with those of the model's own forward pass; None: on a GPU,
            whose kernels no test has seen.
    Raises:
        InputError: layers cannot be compiled that shall be; `train()`: the first row's hidden states differ.
    """

    mean_over = "pairs"
    rewards: np.ndarray

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        args: RewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        tokens_per_row: int = TOKENS_PER_ROW,
        head_init: HeadInit = "default",
        router_aux_loss_coef: float = 0.0,
        compile_layers: Compile = "off",
        check_first_batch: bool | None = None,
        **kwargs: Any,
    ):
        super().__init__(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        if is_peft_model(self.model) and args.deepspeed_plugin is None:
            train_in_float32(self.model)  # the score head is loaded in the dtype of the frozen model
        in_4_bit = kwargs.get("quantization_config") is not None
        if head_init == "normal":
            set_head(self.model, args.seed)
            self.drawn_anew = ("score",)
        self._extremes: list[Tensor] = []
        scorer = self.model.get_base_model() if is_peft_model(self.model) else self.model
        if reason := why_padded(scorer, args):
            if router_aux_loss_coef:
                raise InputError(f"`router_aux_loss_coef`: {reason}, and TRL's padded batches do not have it; leave it out")
            self.stay_padded(scorer, reason, compile_layers)
            one_each = np.ones(0 if eval_dataset is None else len(eval_dataset), dtype=np.int64)
            self.held_out = HeldOut(one_each, one_each, args.per_device_eval_batch_size, self.data_collator)
            return
        take_rows(scorer)
        self.check_first_row(check_first_batch)
        self.data_collator = self.collator(scorer.config.get_text_config().pad_token_id)
        costs, tokens = sizes_of(*self.lengths_of(train_dataset), self.model)
        self.compile_layers(compile_layers, costs, in_4_bit, bool(router_aux_loss_coef))
        amounts = {self.mean_over: self.counts_of(train_dataset)}
        if router_aux_loss_coef:
            self.balance_router(scorer, router_aux_loss_coef)
            self.data_collator.balanced = True
            prompts, responses = lengths_of(train_dataset)
            amounts["router_tokens"] = 2 * prompts + responses.sum(axis=1)
        self.train_row_by_row(costs, tokens, amounts, tokens_per_row)
        if eval_dataset is not None:
            self.held_out = HeldOut(*sizes_of(*self.lengths_of(eval_dataset), self.model), tokens_per_row, self.data_collator)

    def collator(self, pad: int) -> Any:
        """What makes rows one packed row."""
        return Collator(pad)

    def lengths_of(self, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of each row as `packing.lengths_of` gives them."""
        return lengths_of(rows)

    def counts_of(self, rows: Dataset) -> np.ndarray:
        """How many of `mean_over` each row has, (N,)."""
        return np.ones(len(rows))

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # of token ids

    def measure(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a packed row's pairs, and TRL's metrics."""
        rewards = self._rewards_of(model, inputs)
        loss = self._loss(rewards, inputs.get("margin"))
        found = rewards.detach()
        difference = found[:, 0] - found[:, 1]
        self._extremes.append(torch.stack([-found.min(), found.max()]))
        values = torch.stack([found.mean(), (difference > 0).float().mean(), difference.mean()]).tolist()
        return loss, dict(zip(("mean_reward", "accuracy", "margin"), values, strict=True))

    def _loss(self, rewards: Tensor, margins: Tensor | None) -> Tensor:
        """-log sigmoid(chosen - rejected - margin), mean over the pairs (B, 2), and what holds rewards about 0.

        Ouyang et al., 2022, arXiv 2203.02155, equation 1; the margin is Llama 2's, arXiv 2307.09288, equation 2; the last term
        that of Eisenstein et al., 2023, arXiv 2312.09244, equation 2.
        """
        chosen, rejected = rewards.unbind(dim=1)
        loss = -F.logsigmoid(chosen - rejected - (0 if margins is None else margins)).mean()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (chosen + rejected).square().mean()
        return loss

    def _rewards_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Rewards of chosen and rejected, float32 (B, 2)."""
        if "row" in inputs:
            return model(row=inputs["row"], at=inputs["ends"].flatten())[:, 0].float().view(-1, 2)
        padded = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**padded, use_cache=False).logits[:, 0].float().view(2, -1).T

    def check_row(self, model: Any, inputs: dict[str, Any]) -> None:
        """Raise InputError where hidden states at the ends of a row's conversations are not those of the model's own pass."""
        training = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            packed = model(row=inputs["row"], at=inputs["ends"].T.flatten(), states=True).float()  # (2 B, H)
            passes = range(self._most(len(packed)))
            own = torch.stack([self._own_state(model, inputs, number % len(packed)) for number in passes])
        model.train(training)
        own = own[: len(packed)]
        worst = ((packed - own).norm(dim=1) / own.norm(dim=1)).nan_to_num(nan=math.inf).max()
        worst = float(self.accelerator.gather(worst[None]).max())  # all processes end alike
        found = f"hidden states differ by {worst:.2g} of their size from the model's own; rounding explains {STATE_LIMIT:g}"
        if worst > STATE_LIMIT:
            raise InputError(f"first row: {found}. Use another GPU, driver or version of torch")
        log.info("first row: %s", found)

    def _own_state(self, model: Any, inputs: dict[str, Any], number: int) -> Tensor:
        """The hidden state that the model's own forward pass of one conversation gives where its reward is read, (H,)."""
        whole = inputs["input_ids"][number, inputs["attention_mask"][number] > 0].tolist()
        ids = torch.tensor([without_padding(whole, self.data_collator.pad)], device=inputs["input_ids"].device)
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1].float()

    def _most(self, count: int) -> int:
        """The greatest of all processes' counts: a sharded model needs as many forward passes in each."""
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _log_step(self, tokens_before: int) -> None:
        super()._log_step(tokens_before)
        extremes = self.accelerator.gather(torch.stack(self._extremes).amax(dim=0)[None]).amax(dim=0)
        least, most = (extremes * torch.tensor([-1.0, 1.0], device=extremes.device)).tolist()
        self._metrics["train"]["min_reward"].append(least)
        self._metrics["train"]["max_reward"].append(most)
        self._extremes.clear()

    def held_out_rewards(self, starts: np.ndarray, width: int) -> Tensor:
        """The rewards of `eval_dataset`, float64 (starts[-1], width), also in `rewards`: of row i those from starts[i] on."""
        found = torch.zeros(int(starts[-1]), width, dtype=torch.float64, device=self.accelerator.device)
        self.model_wrapped.eval()
        for members, inputs in self.evaluation_rows():
            with torch.no_grad(), self.compute_loss_context_manager():
                rewards = self._rewards_of(self.model_wrapped, inputs)
            if len(members):
                places = np.concatenate([np.arange(starts[member], starts[member + 1]) for member in members])
                found[torch.from_numpy(places)] = rewards.double()
        found = self.accelerator.reduce(found, "sum") / model_parallel_size()
        self.rewards = found.cpu().numpy()
        return found

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """The loss and TRL's metrics as means over all held-out pairs, each counted once, and `rewards`."""
        found = self.held_out_rewards(np.arange(len(self.eval_dataset) + 1), 2)
        margins = None
        if "margin" in self.eval_dataset.column_names:
            margins = torch.tensor(self.eval_dataset["margin"][:], dtype=torch.float64, device=found.device)
        difference = found[:, 0] - found[:, 1]
        numbers = {
            "loss": self._loss(found, margins), "accuracy": (difference > 0).double().mean(), "margin": difference.mean(),
            "mean_reward": found.mean(), "min_reward": found.min(), "max_reward": found.max(),
        }  # fmt: skip
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in numbers.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(found))


def sizes_of(prompts: np.ndarray, responses: np.ndarray, model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray]:
    """What trees with prompts and responses of these lengths cost (`tree_costs`), and their tokens, int64 (N,) each."""
    lengths = prompts, responses + 1  # the last token of a response is an input too
    return tree_costs(*lengths, model_size(model)), tree_tokens(*lengths)


def why_padded(model: PreTrainedModel, config: RewardConfig) -> str | None:
    """Why a reward model, without an adapter's wrapper, is trained on padded batches, or None where it takes packed rows."""
    if not hasattr(model, "score"):
        return "its head is unknown"
    return obstacle(model) or steps_in_backward(config)


def take_rows(model: PreTrainedModel) -> None:
    """Make `model(row=…, at=…)` give the outputs of its score head at the tokens `at`, float32 (N, outputs), in place.

    `at` is int64 (N,). With `states` it gives the hidden states, (N, H). Every other call runs the model's own forward pass.
    """
    for module in model.score.modules():  # an adapter's copy is among them
        if isinstance(module, nn.Linear):
            module.forward = types.MethodType(_linear_in_float32, module)
    own_forward, own_attention = model.forward, model.config._attn_implementation

    def forward(self, *args: Any, row: Row | None = None, at: Tensor | None = None, states: bool = False, **kwargs: Any) -> Any:
        if row is None:
            with attention(self, own_attention):
                return own_forward(*args, **kwargs)
        found = hidden_states(self, row, at)
        if states:
            return found
        return self.score(found)

    # For good, not only during the forward pass: gradient checkpointing runs layers again in the backward.
    model.config._attn_implementation = NAME
    model.forward = types.MethodType(forward, model)


def _linear_in_float32(self: nn.Linear, states: Tensor) -> Tensor:
    """A score head's outputs in float32: a reward in half precision has three digits.

    Under DeepSpeed and FSDP the head's weights are in half precision as all others, rounded from their float32 copy.
    """
    with torch.autocast(states.device.type, enabled=False):
        return F.linear(states.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def set_head(model: nn.Module, seed: int) -> None:
    """Draw the score head's weights anew from N(0, 1 / (d + 1)), d the hidden size (Stiennon et al., 2020, arXiv 2009.01325).

    An adapter's copy of the head gets the same. All processes draw alike.
    """
    for name, weight in model.named_parameters():
        if "score" not in name.split(".") or not name.endswith("weight"):
            continue
        with torch.no_grad(), gathered(weight, writes=True):
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.copy_(drawn / math.sqrt(weight.shape[-1] + 1))
