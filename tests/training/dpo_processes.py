"""Run in several processes by test_dpo_core.py: the packed forward pass in several processes against one, on CPU.

    torchrun --nproc_per_node N dpo_processes.py {ddp,fully_shard,agreement} FOLDER

FOLDER holds `model/`, `tokenizer/` and `rows.json`. `ddp` trains in rows of a few pairs, with TRL's sigmoid loss and then with
all that are not TRL's, and process 0 writes the numbers of each step to `steps-N.json` and `own-steps-N.json`, and what the
evaluations say to `evaluated-N.json` and `own-evaluated-N.json`; `fully_shard` ends with an error where a sharded gradient
differs from the unsharded one; `agreement` checks a sharded model's packing, then again with an attention that is wrong in
process 1 alone, and writes each process's exit code to `code-RANK`.
"""

import copy
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton.errors import InputError
from baton.models import attention
from baton.models.agreement import check_batch
from baton.models.forward import share_prefixes
from baton.models.trees import Layout
from baton.training.sharding import keep_outputs
from dpo_iteration.losses import OWN_LOSSES
from dpo_iteration.trainer import PackedDPOTrainer

PAIRS_PER_STEP = 4


def ddp(folder: Path, model, rows: list[dict], losses: list[str], prefix: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = DPOConfig(
        output_dir=str(folder / f"out-{processes}"),
        loss_type=losses,
        per_device_train_batch_size=PAIRS_PER_STEP // processes,
        per_device_eval_batch_size=PAIRS_PER_STEP // processes,
        eval_strategy="steps",
        eval_steps=3,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PackedDPOTrainer(
        copy.deepcopy(model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: 2 * PAIRS_PER_STEP]),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        tokens_per_row=80,
    )
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    if trainer.is_world_process_zero():
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        (folder / f"{prefix}steps-{processes}.json").write_text(json.dumps(steps))
        names = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
        evaluated = [[entry["step"], *map(entry.get, names)] for entry in trainer.state.log_history if "eval_loss" in entry]
        (folder / f"{prefix}evaluated-{processes}.json").write_text(json.dumps(evaluated))


def sharded(model, rows: list[dict]) -> None:
    torch.distributed.init_process_group("gloo")
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = copy.deepcopy(model)
    for each in (model, whole):
        share_prefixes(each, tokens_per_row=80)
    model = prepared(model, half=False)
    summed_logps(model, rows[rank::processes]).sum().backward()
    for share in range(processes):
        summed_logps(whole, rows[share::processes]).sum().backward()
    for (name, parameter), (_, wanted) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        gradient = parameter.grad.full_tensor()
        expected = wanted.grad / processes  # fully_shard averages over processes
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
    torch.distributed.destroy_process_group()


def agreement(folder: Path, model, rows: list[dict]) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    share_prefixes(model)
    model = prepared(model.eval(), half=False)
    input_ids, attention_mask, labels = batch_of(rows[:3] if rank == 0 else rows[3:8], "chosen_ids")

    def check() -> None:
        check_batch(model, input_ids, attention_mask, (labels != -100).long(), torch.float32, "")

    check()
    if rank == 1:
        by_trees = attention.by_trees
        attention.by_trees = lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:])
    try:
        check()
    except InputError as error:
        (folder / f"code-{rank}").write_text(str(error.exit_code))
    torch.distributed.destroy_process_group()


def summed_logps(model, rows: list[dict], response: str = "chosen_ids") -> torch.Tensor:
    """The summed log-probabilities of each row's response, (rows,), as TRL's trainers ask for them."""
    input_ids, attention_mask, labels = batch_of(rows, response)
    scores = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
    return scores.log_probs.sum(dim=1)


def batch_of(rows: list[dict], response: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` of each row's response, int64 (rows, length)."""
    sequences = [(row["prompt_ids"], row[response]) for row in rows]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids, attention_mask = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(input_ids, -100)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor([*prompt, *response])
        labels[i, len(prompt) : end] = torch.tensor(response)
        attention_mask[i, :end] = 1
    return input_ids, attention_mask, labels


def prepared(model, half: bool):
    """A policy as Trainer and Accelerate prepare it for FSDP on GPUs, which they turn into DDP on a CPU."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
    )
    if half:
        plugin.set_mixed_precision("bf16")
        keep_outputs(plugin)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16" if half else "no", device=torch.device("cpu"),
        is_main_process=torch.distributed.get_rank() == 0,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rows = json.loads((folder / "rows.json").read_text())
    if mode == "ddp":
        ddp(folder, model, rows, ["sigmoid"], "")
        ddp(folder, model, rows, [*OWN_LOSSES, "sft"], "own-")
    elif mode == "agreement":
        agreement(folder, model, rows)
    else:
        sharded(model, rows)


if __name__ == "__main__":
    main()
