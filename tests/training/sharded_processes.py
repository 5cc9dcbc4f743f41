"""Run in several processes by test_layouts.py: reference log-probabilities and what a policy makes of them, in bfloat16.

    sharded_processes.py MATERIAL FOLDER {launched,fsdp}

MATERIAL holds `model/`, `unpackable/`, `tokenizer/` and `rows.json`. `launched` trains two steps under DDP or DeepSpeed, as the
environment says; `fsdp` shards policy and reference as on GPUs: on a CPU Accelerate would turn FSDP into DDP. Process 0 writes
what it found to FOLDER.
"""

import gc
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers.training_args
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig
from trl.trainer.utils import add_fused_lm_head

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton import program
from baton.models.forward import share_prefixes
from baton.partial import PartialRecords
from baton.training import reference, sharding
from dpo_iteration.trainer import PackedDPOTrainer
from tests.training.dpo_processes import prepared, summed_logps

COLUMNS = ("chosen_ids", "rejected_ids")
TOKENS_PER_ROW = 120


def launched(material: Path, folder: Path) -> dict:
    # TrainingArguments refuses bfloat16 where there is neither a GPU nor `use_cpu`; DeepSpeed on a CPU computes in it.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    config = DPOConfig(
        str(folder / "out"), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-3, logging_steps=1, bf16=True,
        gradient_checkpointing=False, ddp_backend="gloo", max_length=None, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list(json.loads((material / "rows.json").read_text())).select_columns(["prompt_ids", *COLUMNS])
    before = numbers_in_memory()
    name, checked = str(material / "model"), {"remedy": "", "check_first_batch": True}
    logps = reference.dataset_reference_logps(rows, COLUMNS, name, config, folder, **checked)
    assert numbers_in_memory() - before < 10 * len(rows), "the reference is still in memory"
    trainer = PackedDPOTrainer(
        name, args=config, processing_class=AutoTokenizer.from_pretrained(material / "tokenizer"),
        train_dataset=rows.add_column("ref_chosen_logps", logps[:, 0]).add_column("ref_rejected_logps", logps[:, 1]),
    )  # fmt: skip
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, rewards = ([entry[name] for entry in steps] for name in ("loss", "rewards/chosen"))
    return {"reference": logps.tolist(), "losses": losses, "rewards": rewards}


def numbers_in_memory() -> int:
    """How many elements all tensors have that are alive."""
    gc.collect()
    return sum({t.data_ptr(): t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor)}.values())


def fsdp(material: Path, folder: Path) -> dict:
    PartialState(cpu=True)
    rows = json.loads((material / "rows.json").read_text())
    pairs = [tuple(row[name] for name in ("prompt_ids", *COLUMNS)) for row in rows]
    device = torch.device("cpu")
    single, half = (
        SimpleNamespace(bf16=bf16, fp16=False, device=device, fsdp_plugin_args=None, deepspeed_plugin=None)
        for bf16 in (False, True)
    )

    def read(name: str, whole: bool = False):
        model = AutoModelForCausalLM.from_pretrained(material / name, dtype="float32")
        assert whole or all(weight.is_meta for weight in model.parameters()) == (program.rank() > 0)
        return model

    def kept(key: str, name: str, config) -> list:
        load = partial(sharding.spread_by_fsdp, partial(read, name), config)
        return reference.kept_reference_logps(pairs, load, folder / "kept", [key], tokens_per_row=TOKENS_PER_ROW).tolist()

    if program.rank() == 0:
        some_done(pairs, folder / "kept", "gone on")
    found = {"model gone on": kept("gone on", "model", single)}
    for name, config in (("model", single), ("unpackable", single), ("model", half)):
        dtype = "bfloat16" if config.bf16 else "float32"
        found[f"{name} {dtype}"] = kept(f"{name} {dtype}", name, config)
    with torch.no_grad():
        policy = read("model", whole=True)
        share_prefixes(policy)
        policy = prepared(policy, half=True)
        found["policy bfloat16"] = torch.stack([summed_logps(policy, rows, name) for name in COLUMNS], dim=1).tolist()
        in_memory = sharding.spread_by_fsdp(partial(read, "model"), single)
        add_fused_lm_head(in_memory)
        found["in TRL's forward pass"] = summed_logps(in_memory, rows).tolist()
    return found


def some_done(pairs: list, folder: Path, key: str) -> None:
    """Leave what another number of processes would leave: a part that holds some batches, with 7 for each number."""
    outline = reference._outline(pairs)
    batches = list(reference._batches(outline, TOKENS_PER_ROW, np.arange(len(pairs))))
    name = f"{reference._name([key, 'ld_alpha=None'], outline.pair)}-{TOKENS_PER_ROW}"
    folder.mkdir()
    part = PartialRecords(folder / name, len(batches), part="8")
    for number in (0, 2):
        part.append(number, {"logps": np.full((len(batches[number]), 2), 7, dtype="<f4").tobytes().hex()})
    part.close()


def main() -> None:
    material, folder, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    found = (launched if mode == "launched" else fsdp)(material, folder)
    if program.rank() == 0:
        (folder / f"{mode}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
