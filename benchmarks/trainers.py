"""Speed and memory of SFT and of reward-model training: TRL's trainers and the packed ones on the same rows and steps.

    python benchmarks/trainers.py sft                                                     # a tiny model, in a minute
    python benchmarks/trainers.py reward --sides packed trl:1 trl:4 trl:8
    python benchmarks/trainers.py sft --model 17m --rows 128 --repeats 3 --sides packed trl:1 trl:2 trl:4 trl:8 trl_packing
    python benchmarks/trainers.py sft --model 1b --device cuda --rows 512 --rows_per_step 64 --tokens_per_row 16384 \
        --sides packed trl:8 trl_packing

A Llama of random weights; rows are random tokens of a chat's lengths, for `reward` pairs of responses to one prompt. In
float32, or with `--device cuda` in bfloat16 under autocast. A side is `packed`, `trl:B` with B rows a micro-batch, or for `sft`
`trl_packing`: TRL's own packing, with about as many rows in a step. All sides but the latter have the same steps, so their
losses are equal.

Each side runs in a process of its own, so that peak memory is its own. `steady` is needed tokens a second by the median
optimizer step: a prompt once, no padding. `share` is what the matrix products of those tokens would take at the speed of a
large product, timed in the same process, over what the step takes; 1 is the ceiling. Attention's own products are not counted.
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

sys.path.pop(0)  # this folder, whose files have the names of stages
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sides import add_arguments, peak_memory, run_in_turn

MODELS = {  # hidden size, layers, heads, key-value heads, intermediate size, vocabulary
    "tiny": (64, 2, 2, 1, 128, 1024),
    "17m": (384, 6, 6, 6, 1024, 8192),
    "1b": (2048, 16, 32, 8, 8192, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["sft", "reward"])
    add_arguments(parser, ["packed", "trl:1", "trl:4", "trl:8"])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rows_per_step", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tokens_per_row", type=int, default=4096)
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="off", help="of `packed`")
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
            f"{run['side']:12} {run['seconds']:7.1f} s, steady {run['steady']:8.0f} tokens/s, share {run['share']:.2f}, "
            f"peak memory {run['memory'] / 2**30:.2f} GiB, losses {run['losses'][0]:.4f} … {run['losses'][-1]:.4f}"
        )


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write rows, tokenizer and model."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, heads, key_value_heads, intermediate, vocabulary = MODELS[args.model]
    rng = random.Random(0)

    def ids(mean: float) -> list[int]:
        length = min(1000, round(rng.lognormvariate(math.log(mean), 0.8)) + 2)
        return [rng.randrange(3, vocabulary) for _ in range(length)]

    rows = [row_of(args.task, ids(60), ids(150), ids(150)) for _ in range(args.rows)]
    (folder / "rows.json").write_text(json.dumps(rows))
    words = {f"t{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1").save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, intermediate_size=intermediate, max_position_embeddings=8192,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def row_of(task: str, prompt: list[int], first: list[int], second: list[int]) -> dict:
    if task == "reward":
        return {"chosen_ids": prompt + first, "rejected_ids": prompt + second, "prompt": len(prompt)}
    return {"input_ids": prompt + first, "labels": [-100] * len(prompt) + first}


def run_side(args: argparse.Namespace) -> dict:
    """Train as `args.run_side` says."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    for module in ("sft.trainer", "reward_model.trainer"):  # before the clock starts
        import_module(module)
    rows = json.loads((args.folder / "rows.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "tokenizer")
    torch.manual_seed(0)  # a new score head is drawn
    if args.task == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(args.folder / "model", dtype="float32", num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype="float32")
    needed, flops = work_of(rows, model)
    product = product_flops(args.device)
    before, begun = peak_memory(args.device), time.perf_counter()
    trainer = trainer_of(args, Dataset.from_list(rows), tokenizer, model)
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    seconds = time.perf_counter() - begun
    step = statistics.median(after - earlier for earlier, after in itertools.pairwise(times))
    part = args.epochs / trainer.state.max_steps  # of the rows, in a step
    return {
        "side": args.run_side,
        "seconds": seconds,
        "steady": needed * part / step,
        "share": flops * part / step / product,
        "memory": peak_memory(args.device) - before,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def work_of(rows: list[dict], model: torch.nn.Module) -> tuple[int, float]:
    """Tokens of an epoch that have to be computed, and the floating-point operations of their matrix products."""
    from baton.training.metrics import forward_flops, weights_of

    if "chosen_ids" in rows[0]:
        tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) - row["prompt"] for row in rows)
        learnt = 0
    else:
        tokens = sum(len(row["input_ids"]) for row in rows)
        learnt = sum(label != -100 for row in rows for label in row["labels"])
    return tokens, 3 * forward_flops(weights_of(model), tokens, learnt)


def trainer_of(args: argparse.Namespace, rows, tokenizer, model):
    """The trainer of a side."""
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from reward_model.trainer import PackedRewardTrainer
    from sft.trainer import PackedSFTTrainer

    name, _, batch = args.run_side.partition(":")
    size = int(batch or args.rows_per_step)
    settings = {
        "output_dir": str(args.folder / "out"),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": args.rows_per_step // size,
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
        "train_sampling_strategy": "sequential",
    }
    given = {"train_dataset": rows, "processing_class": tokenizer}
    more = {"tokens_per_row": args.tokens_per_row, "compile_layers": args.compile} if name == "packed" else {}
    if args.task == "reward":
        made = PackedRewardTrainer if name == "packed" else RewardTrainer
        return made(model, args=RewardConfig(**settings), **given, **more)
    if name == "trl_packing":
        rows_a_pack = args.tokens_per_row * len(rows) / sum(map(len, rows["input_ids"]))
        packs = max(1, round(args.rows_per_step / rows_a_pack))
        settings |= {"packing": True, "max_length": args.tokens_per_row, "per_device_train_batch_size": 1}
        settings["gradient_accumulation_steps"] = packs
    else:
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
    made = PackedSFTTrainer if name == "packed" else SFTTrainer
    return made(model, args=SFTConfig(**settings), **given, **more)


def product_flops(device: str) -> float:
    """FLOP/s of a large matrix product: the median of several."""
    size, turns = (8192, 20) if device == "cuda" else (2048, 7)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    times = []
    for _ in range(turns + 2):  # the first is a warm-up
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return 2 * size**3 / statistics.median(after - earlier for earlier, after in itertools.pairwise(times[1:]))


if __name__ == "__main__":
    main()
