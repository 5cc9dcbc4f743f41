"""Run by test_export.py in two processes on CPU: a few steps in bf16 on a sharded model, and its export.

    export_processes.py {2,3,fsdp} FOLDER OUTPUT

FOLDER holds `model/`, in bfloat16, and `rows.json`. The first word is a ZeRO stage or PyTorch's fully_shard. OUTPUT gets what
`write_model` writes in float32, its facts in `facts.json`, and in `computed.pt` the weights that the sharded model computes
with.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed.ops

from baton import program
from baton.training.export import gathered, tensors_of, write_model

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as in resume_processes.py

STEPS, LEARNING_RATE = 3, 1e-6


def prepared(mode, folder, batches):
    """A sharded model that computes in bf16, what its loss is stepped with, and its batches."""
    if mode == "fsdp":
        torch.distributed.init_process_group("gloo")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        for part in (*model.model.layers, model):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        return model, torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0), batches
    plugin = DeepSpeedPlugin(zero_stage=int(mode), gradient_accumulation_steps=1, zero3_init_flag=False)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    gloo = InitProcessGroupKwargs(backend="gloo")
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16", kwargs_handlers=[gloo])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    engine, _, batches = accelerator.prepare(model, optimizer, batches)
    return engine, None, batches


def main() -> None:
    mode, folder, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = [torch.tensor(row["prompt_ids"] + row["chosen_ids"])[:8] for row in json.loads((folder / "rows.json").read_text())]
    rows = [row for row in rows if len(row) == 8]
    model, optimizer, batches = prepared(mode, folder, DataLoader(rows[: 2 * STEPS], batch_size=1))
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    whole = getattr(model, "module", model)
    facts = write_model(whole, tensors_of(whole), output, str(folder / "model"), "float32")
    computed = {}
    for name, parameter in whole.named_parameters():
        if mode == "3":
            with deepspeed.zero.GatheredParameters([parameter]):
                computed[name] = parameter.detach().clone()
        else:
            computed[name] = parameter.detach().clone() if mode == "2" else gathered(parameter).bfloat16()
    if program.rank() == 0:
        (output / "facts.json").write_text(json.dumps(facts))
        torch.save(computed, output / "computed.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
