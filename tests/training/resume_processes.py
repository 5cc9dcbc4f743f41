"""Run by test_resume_layouts.py in one or several processes: DPO training that goes on from the last whole checkpoint.

    resume_processes.py FOLDER OUTPUT MICRO_BATCH ACCUMULATION [FIELD VALUE …]

FOLDER holds `model/`, `tokenizer/` and `rows.json`; fields are those of DPOConfig, `packed` of PackedDPOTrainer, and
`stop_after`, the step after which the process kills itself, or `die_in_export`, where it does when it has written some weights.
Process R writes a line for each step to OUTPUT.steps-R: its
number, its loss, its rows.
"""

import json
import os
import signal
import sys
from pathlib import Path

import transformers.training_args
import yaml
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton import program
from baton.stage import Stage
from baton.training import export
from baton.training.checkpoints import train
from baton.training.config import log_training, trainer_config
from dpo_iteration.trainer import PackedDPOTrainer


class Steps(TrainerCallback):
    """Writes the steps down and ends the process in the middle."""

    def __init__(self, path: Path, stop_after: int | None):
        self.path, self.stop_after = path, stop_after
        self.rows: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps([state.global_step, logs["loss"], self.rows]) + "\n")
            self.rows = []
        if state.global_step == self.stop_after:
            os.kill(os.getpid(), signal.SIGKILL)


# TrainingArguments refuses bfloat16 where there is neither a GPU nor `use_cpu`; DeepSpeed on a CPU computes in it.
transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def rows_that_count(inputs: dict) -> list[dict]:
    return [row for row in inputs["rows"] if row["shares"]["pairs"]] if "rows" in inputs else [inputs]


def main() -> None:
    folder, output, micro_batch, accumulation = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
    fields = {name: yaml.safe_load(value) for name, value in zip(sys.argv[5::2], sys.argv[6::2], strict=True)}
    if fields.pop("die_in_export", False):
        export.SHARD_BYTES, export.Shards.close = 8000, lambda _: os.kill(os.getpid(), signal.SIGKILL)
    stop_after, packed = fields.pop("stop_after", None), fields.pop("packed", True)
    settings = {
        "per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation, "max_length": None,
        "num_train_epochs": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2, "activation_checkpointing": False,
        "bf16": False, "beta": 0.3,
    }  # fmt: skip
    stage = Stage(output, {})
    config = trainer_config(DPOConfig, settings | fields, [], stage)
    rows = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    trainer = PackedDPOTrainer(
        str(folder / "model"),
        args=config,
        train_dataset=rows,
        eval_dataset=None if config.eval_strategy == "no" else rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        packed=packed,
    )
    steps = Steps(Path(f"{output}.steps-{program.rank()}"), stop_after)
    training_step = trainer.training_step

    def note_rows(model, inputs, *rest):
        steps.rows += [logp for row in rows_that_count(inputs) for logp in row["ref_chosen_logps"].tolist()]
        return training_step(model, inputs, *rest)

    trainer.training_step = note_rows
    trainer.add_callback(steps)
    log_training(trainer)
    train(trainer, stage)


if __name__ == "__main__":
    program.run(main)
