"""Run under a launcher by test_layouts.py: reference log-probabilities and a policy's first steps, in float32 or bfloat16.

    sharded_processes.py FOLDER RUN {float32,bfloat16} {launched,fsdp}

FOLDER holds `model/`, `tokenizer/` and `rows.json`. `launched` trains two steps as the launcher's environment says; `fsdp`
shards policy and reference as Accelerate does on GPUs, which turns FSDP into DDP on a CPU. Process 0 writes `RUN.json`:
`reference`, `policy` (log-probabilities of chosen and rejected), `losses`.
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers.training_args
from accelerate import PartialState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton import program
from baton.models.forward import share_prefixes
from baton.training import reference, sharding
from dpo_iteration.trainer import PackedDPOTrainer

COLUMNS = ("chosen_ids", "rejected_ids")


def launched(folder: Path, run: str, half: bool) -> dict:
    # TrainingArguments refuses bfloat16 for DeepSpeed on a CPU, which Accelerate and DeepSpeed compute in.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    config = DPOConfig(
        str(folder / run), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, logging_steps=1, bf16=half,
        gradient_checkpointing=False, use_cpu="deepspeed" not in run, ddp_backend="gloo" if program.world_size() > 1 else None, max_length=None, beta=0.1,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list(json.loads((folder / "rows.json").read_text())).select_columns(["prompt_ids", *COLUMNS])
    before = numbers_in_memory()
    logps = reference.dataset_reference_logps(rows, COLUMNS, str(folder / "model"), config, folder / run)
    assert numbers_in_memory() - before < len(rows) * 10, "the reference is still in memory"
    rows = rows.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1])
    trainer = PackedDPOTrainer(
        str(folder / "model"), args=config, train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rewards = [entry["rewards/chosen"] for entry in trainer.state.log_history if "loss" in entry]
    return {"reference": logps.tolist(), "losses": losses, "rewards": rewards}


def numbers_in_memory() -> int:
    """How many elements all tensors have that are alive."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)}
    return sum(storages.values())


def fsdp(folder: Path, run: str, half: bool) -> dict:
    PartialState(cpu=True)
    pairs = [tuple(row[name] for name in ("prompt_ids", *COLUMNS)) for row in json.loads((folder / "rows.json").read_text())]
    config = SimpleNamespace(
        bf16=half, fp16=False, device=torch.device("cpu"), fsdp_plugin_args=None, deepspeed_plugin=None, fsdp=True
    )
    read = partial(AutoModelForCausalLM.from_pretrained, folder / "model", dtype="float32")
    logps = reference.kept_reference_logps(
        pairs, lambda: sharding.spread_by_fsdp(read, config), folder / run, [run], tokens_per_row=120
    )
    return {"reference": logps.tolist()}


def main() -> None:
    folder, run, dtype, mode = Path(sys.argv[1]), *sys.argv[2:]
    found = (launched if mode == "launched" else fsdp)(folder, run, dtype == "bfloat16")
    if program.rank() == 0:
        (folder / f"{run}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
