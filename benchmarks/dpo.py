"""DPO speed and memory: TRL's trainer and the packed one in turn, on the same pairs and optimizer steps.

    python benchmarks/dpo.py --data alpaca_eval_k8.jsonl.gz
    python benchmarks/dpo.py --data … --model smollm2 --model_path SmolLM2-135M-Instruct --dtype autocast --repeats 3 \
        --pairs 128 --sides trl:1 trl:2 trl:4 trl:8 packed:8 --choose_trl_on 16  # only the best of TRL's runs on all pairs
    python benchmarks/dpo.py --data … --model smollm2 --model_path … --sides packed:8 --profile  # a step's top operations
    python benchmarks/dpo.py --data … --sides trl:1 packed:4 --turns 3 --max_length 2048  # long prompts
    python benchmarks/dpo.py --data … --model 1b --gradient_checkpointing --tokens_per_row 16384  # one GPU
    python benchmarks/dpo.py --data … --model tiny --pairs 16 --sides packed:8  # the same code in seconds

The data file holds `prompt`, `responses`, `rewards` a line; the best response against the worst makes a pair. A model is a
Llama of random weights whose byte-level BPE tokenizer is made on the spot, or `smollm2`: a folder with weights, tokenizer and
chat template. A side is `trl:B` (TRL's forward pass, B pairs a micro-batch), `trl_precompute:B` (the same with
`precompute_ref_log_probs`) or `packed:B`. `packed` also runs where TRL is not installed, by the plain loop in this file.

Each side runs in a process of its own, so that peak memory is its own. Its time counts everything but the loading: the
reference model's log-probabilities, what is compiled, all epochs. `steady` is the useful work of an optimizer step over the
median step's time, in GFLOP/s; `product` is what a large matrix product reaches in the same process, before and after.
"""

import argparse
import gzip
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from baton.training.metrics import forward_flops, peak_flops, weights_of
from benchmarks.sides import add_arguments, in_process, peak_memory, run_in_turn

MODELS = {  # hidden size, layers, heads, key-value heads, intermediate size, vocabulary, head tied to the embedding
    "tiny": (64, 2, 2, 1, 128, 1024, True),
    "17m": (384, 6, 6, 6, 1024, 8192, False),
    "1b": (2048, 16, 32, 8, 8192, 128256, True),
}
SPECIAL = ["<pad>", "<user>", "<assistant>", "<end>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="annotated responses, .jsonl or .jsonl.gz")
    add_arguments(parser, ["trl:4", "packed:8"])
    parser.add_argument("--choose_trl_on", type=int, metavar="PAIRS", help="find TRL's fastest side on so many pairs first")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of the data set")
    parser.add_argument("--pairs_per_step", type=int, default=8, help="pairs of one optimizer step")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=0, help="earlier question-answer turns in every prompt")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens; longer responses are cut")
    parser.add_argument("--model", choices=[*MODELS, "smollm2"], default="17m")
    parser.add_argument("--model_path", help="folder of `--model smollm2`, with its tokenizer and chat template")
    parser.add_argument("--dtype", choices=["float32", "autocast", "bf16"], default="bf16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--tokens_per_row", type=int, default=4096, help="most tokens of a packed row")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="compile the layers of packed rows")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--profile", action="store_true", help="also print the top ten operations of a step of each side")
    parser.add_argument("--plot", help="a .png for the loss of every step, side by side")
    args = parser.parse_args()
    if (args.model == "smollm2") != bool(args.model_path):
        parser.error("--model smollm2 and --model_path go together")
    if args.run_side:
        print(json.dumps(run_side(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        if args.choose_trl_on and any(side.startswith("trl") for side in args.sides):
            args.sides = choose_trl(args, Path(folder))
        results = run_in_turn(args, Path(folder))
    report(args, results)
    for result in results:
        if args.profile:
            print(f"\n{result['side']}, one step:\n{result['profile']}")
    if args.plot:
        plot_losses(results, args.plot)


def choose_trl(args: argparse.Namespace, folder: Path) -> list[str]:
    """The sides without those of TRL's that were not the fastest on the first `choose_trl_on` pairs, one run of each."""
    trls = [side for side in args.sides if side.startswith("trl")]
    runs = [in_process(side, folder, "--pairs", str(args.choose_trl_on)) for side in trls]
    for run in runs:
        print(f"{run['side']} on {args.choose_trl_on} pairs: {run['seconds']:.1f} s", file=sys.stderr)
    best = min(runs, key=lambda run: run["seconds"])["side"]
    return [side for side in args.sides if side not in trls or side == best]


# Data and model


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the tokenizer and the tokenised pairs to `folder`."""
    opened = gzip.open if args.data.endswith(".gz") else open
    with opened(args.data, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    make = of_chat_model if args.model_path else of_bytes
    tokenizer, encode_prompt, encode_response = make(args, records)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = pairs(records, encode_prompt, encode_response, args.turns, args.max_length)[: args.pairs]
    (folder / "rows.json").write_text(json.dumps(rows))


def of_chat_model(args: argparse.Namespace, records: list[dict]) -> tuple:
    """The tokenizer of `--model_path`, and functions from messages and from a response to token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)

    def encode_prompt(messages: list[dict]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode_response(text: str) -> list[int]:
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    return tokenizer, encode_prompt, encode_response


def of_bytes(args: argparse.Namespace, records: list[dict]) -> tuple:
    """The same of a byte-level BPE tokenizer that is trained on the records."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = (text for record in records for text in (record["prompt"][-1]["content"], *record["responses"]))
    size = min(MODELS[args.model][5], 32768)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    ids = {"user": bpe.token_to_id("<user>"), "assistant": bpe.token_to_id("<assistant>")}
    end = bpe.token_to_id("<end>")

    def encode_prompt(messages: list[dict]) -> list[int]:
        turns = [[ids[message["role"]], *encode_response(message["content"])] for message in messages]
        return [token for turn in turns for token in turn] + [ids["assistant"]]

    def encode_response(text: str) -> list[int]:
        return [*bpe.encode(text).ids, end]

    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>"), encode_prompt, encode_response


def pairs(records: list[dict], encode_prompt: Callable, encode_response: Callable, turns: int, max_length: int) -> list[dict]:
    """Tokenised best-against-worst pairs, after `turns` turns taken from the records before; ties left out."""

    def ranked(record: dict) -> list[int]:
        return sorted(range(len(record["rewards"])), key=record["rewards"].__getitem__)

    rows = []
    for index in range(turns, len(records)):
        record = records[index]
        order = ranked(record)
        if record["rewards"][order[0]] == record["rewards"][order[-1]]:
            continue
        messages = []
        for earlier in records[index - turns : index]:
            answer = earlier["responses"][ranked(earlier)[-1]]
            messages += [earlier["prompt"][-1], {"role": "assistant", "content": answer}]
        prompt = encode_prompt([*messages, record["prompt"][-1]])
        room = max_length - len(prompt)
        if room < 16:
            continue
        chosen, rejected = (encode_response(record["responses"][i])[:room] for i in (order[-1], order[0]))
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def make_model(args: argparse.Namespace):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    if args.model_path:
        return AutoModelForCausalLM.from_pretrained(args.model_path, dtype=dtype).to(args.device)
    hidden, layers, heads, key_value_heads, intermediate, vocabulary, tied = MODELS[args.model]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tied,
        intermediate_size=intermediate,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    with torch.device(args.device):
        return LlamaForCausalLM(config).to(dtype)


# One side


def run_side(args: argparse.Namespace) -> dict:
    """Train as `args.run_side` says; pairs/s, seconds, peak memory and the loss of every step."""
    rows = json.loads((args.folder / "rows.json").read_text())[: args.pairs]
    side, batch_size = args.run_side.split(":")
    train = with_trainer if trl_is_there() else without_trl
    import_module("baton.training.reference" if train is without_trl else "dpo_iteration.trainer")  # before the clock starts
    before = peak_memory(args.device)
    model = make_model(args)
    products = [product_flops(args)]
    clock = StepClock(args.device)
    start, cpu_start = time.perf_counter(), time.process_time()
    losses = train(args, side, int(batch_size), rows, model, args.epochs, clock)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    memory = peak_memory(args.device) - before
    products.append(product_flops(args))
    steps = [after - before for before, after in itertools.pairwise(clock.times)]
    step_flops = training_flops(model, rows) * args.pairs_per_step / len(rows)
    return {
        "side": args.run_side,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_step_at": clock.times[0] - start,
        "pairs_per_second": args.epochs * len(rows) / seconds,
        "memory": memory,
        "losses": losses,
        "flops": args.epochs * training_flops(model, rows) + training_flops(model, rows) / 3,
        "steady": step_flops / statistics.median(steps) if steps else None,
        "product": statistics.mean(products),
        "profile": profile(args, train, side, int(batch_size), rows, model) if args.profile else "",
    }


class StepClock:
    """When each optimizer step ended; `profiler` is told of each."""

    def __init__(self, device: str, profiler: torch.profiler.profile | None = None):
        self.times: list[float] = []
        self.device, self.profiler = device, profiler

    def step(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if self.profiler:
            self.profiler.step()


def product_flops(args: argparse.Namespace) -> float:
    """FLOP/s of a large matrix product, in the dtype of the model's: the median of several."""
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    size, turns = (8192, 20) if args.device == "cuda" else (2048, 7)
    left, right = torch.randn(2, size, size, device=args.device, dtype=dtype)
    clock = StepClock(args.device)
    for _ in range(turns + 2):  # the first is a warm-up
        left @ right
        clock.step()
    times = clock.times[1:]
    return 2 * size**3 / statistics.median(after - before for before, after in itertools.pairwise(times))


def profile(args: argparse.Namespace, train: Callable, side: str, batch_size: int, rows: list[dict], model) -> str:
    """The ten operations of an optimizer step, the third, that take most time."""
    devices = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        devices.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=devices, schedule=torch.profiler.schedule(wait=1, warmup=1, active=1)) as profiler:
        train(args, side, batch_size, rows[: 3 * args.pairs_per_step], model, 1, StepClock(args.device, profiler))
    return profiler.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=10, max_name_column_width=60)


def trl_is_there() -> bool:
    import importlib.util

    return importlib.util.find_spec("trl") is not None


def with_trainer(args, side: str, batch_size: int, rows: list[dict], model, epochs: int, clock: StepClock) -> list[float]:
    """The trainer as users run it; the loss of every optimizer step."""
    import copy

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig

    from baton.training.reference import reference_logps
    from dpo_iteration.trainer import PackedDPOTrainer

    class TellClock(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.step()

    packed = side == "packed"
    if packed:
        with autocast(args):
            logps = reference_logps(model, [tuple(row.values()) for row in rows]).tolist()
        rows = [
            {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for row, (chosen, rejected) in zip(rows, logps, strict=True)
        ]
    config = DPOConfig(
        output_dir=str(args.folder / "out"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=args.pairs_per_step // batch_size,
        num_train_epochs=epochs,
        learning_rate=args.learning_rate,
        bf16=args.dtype != "float32",
        gradient_checkpointing=args.gradient_checkpointing,
        precompute_ref_log_probs=side == "trl_precompute",
        use_cpu=args.device == "cpu",
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PackedDPOTrainer(
        model,
        ref_model=copy.deepcopy(model) if side == "trl" else None,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.folder / "tokenizer"),
        tokens_per_row=args.tokens_per_row,
        packed=packed,
        compile_layers=args.compile if packed else "off",
        callbacks=[TellClock()],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "autocast")


def without_trl(args, side: str, batch_size: int, rows: list[dict], model, epochs: int, clock: StepClock) -> list[float]:
    """The packed forward pass under a plain loop of AdamW; the loss of every optimizer step."""
    from baton.models.forward import share_prefixes
    from baton.training.reference import reference_logps

    if side != "packed":
        raise SystemExit(f"{side}: TRL is not installed here (pip install trl==1.16.0), only packed sides run")
    with autocast(args):
        reference = reference_logps(model, [tuple(row.values()) for row in rows])  # (pairs, 2)
    share_prefixes(model, args.tokens_per_row)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        for first in range(0, len(rows), args.pairs_per_step):
            step = order[first : first + args.pairs_per_step]
            losses.append(0.0)
            for start in range(0, len(step), batch_size):
                members = step[start : start + batch_size]
                with autocast(args):
                    logps = pair_logps(model, [rows[i] for i in members])
                loss = sigmoid_loss(logps, reference[members]).sum() / len(step)
                loss.backward()
                losses[-1] += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            clock.step()
    return losses


def pair_logps(model, rows: list[dict]) -> Tensor:
    """Summed log-probabilities (pairs, 2) of chosen and rejected, from a batch of TRL's kind."""
    sequences = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    attention_mask = torch.zeros_like(input_ids)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[i, :end] = torch.tensor([*prompt, *response])
        labels[i, len(prompt) : end] = torch.tensor(response)
        attention_mask[i, :end] = 1
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return torch.stack(model(**inputs, fused_lm_head=True).log_probs.sum(dim=1).chunk(2), dim=1)


def sigmoid_loss(logps: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta * (chosen log-ratio - rejected log-ratio)), (pairs,); arXiv 2305.18290, eq. 7."""
    chosen, rejected = (logps - reference).unbind(dim=1)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


# Report


def training_flops(model, rows: list[dict]) -> float:
    """Floating-point operations of the matrix products that one epoch of training on these pairs needs.

    Each distinct prompt token once, the LM head on response tokens only. The reference's forward pass is a third of it.
    """
    scored = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    tokens = scored + sum(len(row["prompt_ids"]) for row in rows)
    return 3 * forward_flops(weights_of(model), tokens, scored)


def report(args: argparse.Namespace, results: list[dict]) -> None:
    """Print the sides, the ratios to each TRL side, and the largest difference of a step's loss."""
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    peak = peak_flops(torch.device(args.device))
    where = gpu or f"{torch.get_num_threads()} CPU threads"
    data = f"{args.pairs} pairs x {args.epochs} epochs, {args.pairs_per_step} a step, {args.turns} turns before"
    print(f"{args.model}, {args.dtype}, {where}; {data}; median of {args.repeats} runs")
    print(
        f"{'side':<20} {'pairs/s':>8} {'seconds':>8} {'CPU s':>8} {'1st step':>8} {'peak GiB':>9} {'steady':>8} {'product':>8}"
        f" {'share':>6} {'MFU':>6}"
    )
    for result in results:
        mfu = f"{result['flops'] / result['seconds'] / peak:6.3f}" if peak else f"{'-':>6}"
        steady, product = (result["steady"] or 0) / 1e9, result["product"] / 1e9
        print(
            f"{result['side']:<20} {result['pairs_per_second']:8.2f} {result['seconds']:8.1f} {result['cpu_seconds']:8.1f}"
            f" {result['first_step_at']:8.1f} {result['memory'] / 2**30:9.2f} {steady:8.0f} {product:8.0f}"
            f" {steady / product:6.2f} {mfu}"
        )
    for ours in (result for result in results if result["side"].startswith("packed")):
        for trls in (result for result in results if result["side"].startswith("trl")):
            difference = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], trls["losses"], strict=True))
            print(
                f"{ours['side']} / {trls['side']}: {trls['seconds'] / ours['seconds']:.2f} x speed,"
                f" {(ours['steady'] or 0) / (trls['steady'] or 1):.2f} x in the steady state"
                f" ({trls['cpu_seconds'] / ours['cpu_seconds']:.2f} x by CPU time),"
                f" {ours['memory'] / trls['memory']:.2f} x memory,"
                f" largest relative difference of a step's loss {difference:.1e}"
            )


def plot_losses(results: list[dict], path: str) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for result, style in zip(results, ["-", "--", ":", "-."] * len(results), strict=False):
        axes.plot(range(1, len(result["losses"]) + 1), result["losses"], style, label=result["side"])
    axes.set(xlabel="optimizer step", ylabel="loss", title="DPO loss on the same order of the same pairs")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
