"""What a DPO run logs beside TRL's metrics: KL, lengths, speed, useful share, MFU, and warnings of the usual troubles.

TRL logs `rewards/accuracies`, `rewards/margins`, `logps/chosen` and `logps/rejected`; what is added here is defined at
`kl_on_pairs` and `LineOfMetrics`. TRL is not imported, so that benchmarks/dpo.py counts FLOPs in the same way without it.
"""

import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from baton.parallel import model_parallel_size

log = logging.getLogger("baton")

PEAK_FLOPS = {  # dense bf16, by words of the GPU's name, the longer first; the maker's data sheets
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A40": 150e12, "A30": 165e12,
    "RTX 6000 Ada": 182e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip

# A fall of the chosen responses that is worth a warning: their tokens became a tenth less likely, on average.
FALL_PER_TOKEN = 0.1  # nats
# A mean loss so close to ln 2 means margins of a few thousandths: the policy is still the reference.
NEAR_LN_2 = 0.003


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None where it is not known."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(gpu: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU of this name, or None where it is not known."""
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", gpu)), None)


def weights_of(model: nn.Module) -> tuple[int, int]:
    """How many weights of a causal language model take part in matrix products: `(body, LM head)`.

    A sequence classifier has no LM head; its score head is part of the body. The embedding is looked up, not multiplied, unless
    it is the head as well. Of a mixture of experts all experts are counted. Weights that ZeRO-3 has sharded or bitsandbytes
    packed count in full.
    """
    output = model.get_output_embeddings()
    head = None if output is None else output.weight
    lookup = model.get_input_embeddings().weight
    body = sum(_count(p) for p in model.parameters() if p is not head and p is not lookup)
    return body, 0 if head is None else _count(head)


def _count(parameter: Tensor) -> int:
    packed = 2 * parameter.element_size() if hasattr(parameter, "quant_state") else 1  # two 4-bit weights a byte
    return getattr(parameter, "ds_numel", parameter.numel()) * packed


def forward_flops(weights: tuple[int, int], tokens: int, scored: int) -> float:
    """Floating-point operations of one forward pass's matrix products: 2 a weight and token, the head on scored tokens.

    A backward pass takes twice that for a trained model, once for a frozen one with an adapter. Attention scores and
    recomputation are not counted.
    """
    body, head = weights
    return 2.0 * (body * tokens + head * scored)


def kl_on_pairs(chosen_reward: float, rejected_reward: float, beta: float) -> float:
    """Mean of log p_policy(y|x) - log p_reference(y|x) over the chosen and rejected responses, in nats a response.

    It estimates KL(policy || reference) as far as the responses are samples of the policy: in the first steps of a round
    on the policy's own responses, but for the choice of the best and the worst. Training then moves the policy away from
    what sampled them, and the number falls, below 0 too. From TRL's rewards, which are `beta` times these log-ratios.
    """
    return (chosen_reward + rejected_reward) / 2 / beta


def rounded_away(model: nn.Module, learning_rate: float) -> str:
    """A sentence where trained weights lose steps of this size to their dtype, since no float32 copy is kept; else nothing.

    Adam moves a weight by about the learning rate in a step, and a number keeps a change of half its distance to the next.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() for p in trained)
    lost = sum(int((p.detach().abs() * torch.finfo(p.dtype).eps / 4 > learning_rate).sum()) for p in trained)
    if not weights or lost < weights / 2:
        return ""
    dtype = str(trained[0].dtype).removeprefix("torch.")
    return (
        f"{lost / weights:.0%} of the weights, which are {dtype} without a float32 copy, are too large to be moved by a step "
        "of this learning rate: load them in float32. "
    )


class LineOfMetrics:
    """Counts what one process computes between two lines of the log, and turns it into that line's numbers.

    - `lengths/chosen`, `lengths/rejected`: mean tokens of a response, as trained on.
    - `useful_tokens`: tokens that must be computed (every distinct prompt of a batch once, every distinct response to it
      once) over the tokens that were computed, repeated prompts and padding included.
    - `tokens_per_second`: useful tokens of all data-parallel ranks, by the wall-clock time since the line before.
    - `mfu`: FLOP/s of the matrix products that useful tokens need, over the peak in bf16 of the GPUs of all processes, where
      that is known.

    Args:
        weights: `weights_of` the model.
        passes: forward passes that one training step's matrix products come to: 3, or 2 with an adapter.
        peak: FLOP/s of one process's GPU; None: `mfu` is left out.
    """

    def __init__(self, weights: tuple[int, int], passes: int, peak: float | None):
        self.weights, self.passes, self.peak = weights, passes, peak
        self.start()

    def start(self) -> None:
        """Begin a line."""
        self.since = time.perf_counter()
        self.pairs = self.chosen = self.rejected = self.needed = self.computed = 0

    def add(self, completion_mask: Tensor, needed: int, computed: int) -> None:
        """One batch: `completion_mask` (2 B, L) as TRL's collator makes it, chosen first; token counts."""
        chosen, rejected = completion_mask.sum(dim=1).chunk(2)
        self.pairs += len(chosen)
        self.chosen += int(chosen.sum())
        self.rejected += int(rejected.sum())
        self.needed += needed
        self.computed += computed

    def line(self, accelerator: Any) -> dict[str, float]:
        """The numbers since `start`, over all processes, which all have to call this; then the next line begins."""
        seconds = time.perf_counter() - self.since
        counts = torch.tensor([self.pairs, self.chosen, self.rejected, self.needed, self.computed], dtype=torch.int64)
        # Processes that hold one model together count the same data, each all of it.
        counts = accelerator.reduce(counts.to(accelerator.device), "sum") // model_parallel_size()
        pairs, chosen, rejected, needed, computed = counts.tolist()
        self.start()
        if not pairs:
            return {}
        line = {
            "lengths/chosen": chosen / pairs,
            "lengths/rejected": rejected / pairs,
            "useful_tokens": needed / computed,
            "tokens_per_second": needed / seconds,
        }
        if self.peak:
            flops = self.passes * forward_flops(self.weights, needed, chosen + rejected)
            line["mfu"] = flops / seconds / (self.peak * accelerator.num_processes)
        return line


def first_line_past(step: int, lines: Sequence[int]) -> bool:
    """Whether the last of `lines` is the first line of the log that is a mean over steps after `step` alone.

    `lines` are the steps at which lines were written, ascending. Each line is a mean over the steps since the one before it.
    """
    *earlier, last = [0, *lines[:-1]]  # for each line, the last step that it does not cover
    return last >= step and all(before < step for before in earlier)


class EvaluateAtEnd(TrainerCallback):
    """Has the policy evaluated at the last step too, whatever `eval_steps` says."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "epoch":
            control.should_evaluate = True


class WarnOfTrouble(TrainerCallback):
    """Warns once each, from the lines of the log, that the chosen responses fall, and that the policy does not learn.

    Args:
        starts_at_ln_2: whether the loss is ln 2 where policy and reference are the same.
    """

    def __init__(self, beta: float, starts_at_ln_2: bool):
        self.beta, self.starts_at_ln_2 = beta, starts_at_ln_2
        self.warned_of_fall = False

    def on_log(self, args, state, control, logs=None, model=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs or "rewards/chosen" not in logs:
            return
        self._warn_of_falling(state, logs)
        self._warn_of_ln_2(args, state, logs, model)

    def _warn_of_falling(self, state, logs: dict[str, float]) -> None:
        # Against the reference, since batches differ more in their responses than the policy changes.
        first = next((line["rewards/chosen"] for line in state.log_history if "rewards/chosen" in line), None)
        if self.warned_of_fall or first is None or not self.beta or not logs.get("lengths/chosen"):
            return
        fall = (first - logs["rewards/chosen"]) / self.beta
        if math.isnan(fall) or fall < FALL_PER_TOKEN * logs["lengths/chosen"]:
            return
        self.warned_of_fall = True
        log.warning(
            "step %d: the log-probability of the chosen responses has fallen by %.1f nats since the first line (%.2f a token), "
            "while the margin is %.2f: the policy moves away from good responses too. What helps: a term that holds them "
            "(`loss_type: [sigmoid, sft]` with `loss_weights: [1.0, 0.1]`), a smaller `learning_rate`, a larger `beta`",
            state.global_step, fall, fall / logs["lengths/chosen"], logs["rewards/margins"],
        )  # fmt: skip

    def _warn_of_ln_2(self, args, state, logs: dict[str, float], model: nn.Module | None) -> None:
        if not self.starts_at_ln_2 or "loss" not in logs:
            return
        learning_begins = args.get_warmup_steps(state.max_steps) + max(state.max_steps // 10, 5)
        lines = [line["step"] for line in state.log_history if "rewards/chosen" in line]
        if not first_line_past(learning_begins, lines) or abs(logs["loss"] - math.log(2)) > NEAR_LN_2:
            return
        rounded = "" if model is None or args.deepspeed_plugin is not None else rounded_away(model, args.learning_rate)
        log.warning(
            "step %d: the loss is still %.4f, which is ln 2, as if the policy were the reference (accuracy %.2f). %sCheck "
            "`learning_rate` (%g) and `beta` (%g: too small?); that the chat template and the tokenizer are those that the "
            "responses were made with (the pairs file beside the output shows the texts); and that chosen and rejected are not "
            "labelled by chance",
            state.global_step, logs["loss"], logs["rewards/accuracies"], rounded, args.learning_rate, self.beta,
        )  # fmt: skip
