"""Distillation speed and memory: TRL's GKDTrainer and distillation/run_kd.py's trainer on the same rows and optimizer steps.

    python benchmarks/distillation.py                                                     # a tiny model, in a minute
    python benchmarks/distillation.py --model 17m --rows 128 --repeats 3 --sides packed trl:1 trl:2 trl:4 trl:8
    python benchmarks/distillation.py --model 1b --device cuda --rows 512 --rows_per_step 32 --sides packed trl:4 trl:8

Student and teacher are Llamas of random weights, the teacher of twice the layers; rows are random tokens of a chat's lengths.
All sides have the same loss, the Jensen-Shannon divergence alone, in float32, or with `--device cuda` in bfloat16 under
autocast. A side is `packed` or `trl:B`, with B rows a micro-batch, on the given rows (`lmbda=0`). TRL's teacher runs in every
step and gives all logits; ours runs once and gives `--top` tokens. With the whole vocabulary (`--top 0`) the losses are equal.

Each side runs in a process of its own, so that peak memory is its own. Its time counts everything but the loading of the
student: the teacher, and all epochs. `steady` is learnt tokens a second by the median optimizer step, for `packed` without the
teacher.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import torch

sys.path.pop(0)  # this folder, whose distillation.py would hide the stage
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sides import add_arguments, peak_memory, run_in_turn

MODELS = {  # hidden size, layers, heads, key-value heads, intermediate size, vocabulary
    "tiny": (64, 2, 2, 1, 128, 1024),
    "17m": (384, 6, 6, 6, 1024, 8192),
    "1b": (2048, 16, 32, 8, 8192, 128256),
}
BETA = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, ["packed", "trl:1", "trl:4", "trl:8"])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rows_per_step", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--top", type=int, default=64, help="tokens that are kept; 0: all")
    parser.add_argument("--tokens_per_row", type=int, default=4096)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if args.run_side:
        print(json.dumps(run_side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        runs = run_in_turn(args, Path(folder))
    for run in runs:
        print(
            f"{run['side']:8} {run['seconds']:7.1f} s (the teacher {run['teacher']:.1f}), steady {run['steady']:8.0f} "
            f"tokens/s, peak memory {run['memory'] / 2**30:.2f} GiB, losses {run['losses'][0]:.4f} … {run['losses'][-1]:.4f}"
        )


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write rows, tokenizer, student and teacher."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, heads, key_value_heads, intermediate, vocabulary = MODELS[args.model]
    rng, rows = random.Random(0), []
    for _ in range(args.rows):
        prompt, response = (min(1000, round(rng.lognormvariate(math.log(mean), 0.8)) + 2) for mean in (60, 150))
        ids = [rng.randrange(3, vocabulary) for _ in range(prompt + response)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    (folder / "rows.json").write_text(json.dumps(rows))
    words = {f"t{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1").save_pretrained(folder / "tokenizer")
    for seed, (name, factor) in enumerate((("student", 1), ("teacher", 2))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=factor * layers, num_attention_heads=heads,
            num_key_value_heads=key_value_heads, intermediate_size=intermediate, max_position_embeddings=8192,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True, initializer_range=0.1,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)


def run_side(args: argparse.Namespace) -> dict:
    """Train as `args.run_side` says."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    for module in ("distillation.trainer", "trl.experimental.gkd"):  # before the clock starts
        import_module(module)
    rows = Dataset.from_list(json.loads((args.folder / "rows.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "tokenizer")
    student = AutoModelForCausalLM.from_pretrained(args.folder / "student", dtype="float32")
    before, begun = peak_memory(args.device), time.perf_counter()
    make = packed if args.run_side == "packed" else trl
    trainer, teacher_seconds = make(args, rows, tokenizer, student)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    steps = [after - earlier for earlier, after in itertools.pairwise(times)]
    learnt = sum(label != -100 for labels in rows["labels"] for label in labels)
    return {
        "side": args.run_side,
        "seconds": time.perf_counter() - begun,
        "teacher": teacher_seconds,
        "steady": learnt / len(rows) * args.rows_per_step / statistics.median(steps),
        "memory": peak_memory(args.device) - before,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def settings_of(args: argparse.Namespace, batch: int) -> dict:
    return {
        "output_dir": str(args.folder / "out"),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": args.rows_per_step // batch,
        "num_train_epochs": args.epochs,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "bf16": args.device == "cuda",
        "use_cpu": args.device == "cpu",
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def packed(args, rows, tokenizer, student):
    """The trainer of distillation/run_kd.py, and the seconds that the teacher took."""
    from trl import SFTConfig

    from baton.training.learnt import outline
    from distillation.teacher import kept_teacher
    from distillation.trainer import PackedKDTrainer

    config, vocabulary = SFTConfig(**settings_of(args, args.rows_per_step)), MODELS[args.model][5]
    begun, outlined = time.perf_counter(), outline(rows)
    top = min(args.top or vocabulary, vocabulary)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    kept = kept_teacher(rows, outlined, str(args.folder / "teacher"), config, folder, top, vocabulary, args.tokens_per_row)
    seconds = time.perf_counter() - begun
    trainer = PackedKDTrainer(
        student, args=config, train_dataset=rows, outline=outlined, teacher=kept, whole=top == vocabulary,
        loss="jensen_shannon", beta=BETA, kd_coef=1.0, tokens_per_row=args.tokens_per_row, processing_class=tokenizer,
    )  # fmt: skip
    return trainer, seconds


def trl(args, rows, tokenizer, student):
    """TRL's GKDTrainer on given rows; its teacher runs within the steps."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from baton.training.learnt import right_padded

    def collate(examples: list[dict]) -> dict:
        columns = (("input_ids", 0), ("labels", -100))
        ids, labels = (right_padded([row[name] for row in examples], value) for name, value in columns)
        lengths = torch.tensor([len(row["input_ids"]) for row in examples])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    config = GKDConfig(**settings_of(args, int(args.run_side.split(":")[1])), lmbda=0.0, beta=BETA)
    teacher = {"dtype": "bfloat16" if args.device == "cuda" else "float32"}
    config.teacher_model_init_kwargs = teacher
    trainer = GKDTrainer(
        student, str(args.folder / "teacher"), config, data_collator=collate, train_dataset=rows, processing_class=tokenizer
    )
    return trainer, 0.0


if __name__ == "__main__":
    main()
