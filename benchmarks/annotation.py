"""Speed of Bradley-Terry scoring: get_rewards.py's scorer, a transformers pipeline, and padded batches, on the same responses.

    python benchmarks/annotation.py --data alpaca_eval_k8.jsonl.gz                              # all of it, 2 processes
    python benchmarks/annotation.py --data … --prompts 40 --turns 3                             # a part, three times
    python benchmarks/annotation.py --data … --device cuda --processes 1                        # on a GPU

The data file holds `prompt` and `responses` a line. The reward model (a Llama of random weights, 13.8 M parameters) and its
byte-level BPE tokenizer are made on the spot. The sides, each in processes of its own, one after the other in every turn:

    ours        annotate_data: from the records to the finished output, its summary included
    pipeline    transformers' text-classification pipeline with batch_size=1, one call per prompt as Online-RLHF makes them
    padded:B    batches of B, sorted by length over the whole file, padded, with a mask; tokenised before its time begins

Times exclude loading the model and are those of the slowest process. CPU seconds, summed over the processes, say more than
wall-clock seconds where the machine does other work as well.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="responses, .jsonl or .jsonl.gz")
    parser.add_argument("--prompts", type=int, help="use so many prompts, spread evenly over the file (default: all)")
    parser.add_argument("--sides", nargs="+", default=["ours", "pipeline", *(f"padded:{b}" for b in (1, 2, 4, 8, 16))])
    parser.add_argument("--turns", type=int, default=1, help="how often each side runs; medians are compared")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--run_side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        print(f"{prepare(args)} responses, {args.processes} processes, {args.device}, {args.dtype}", flush=True)
        times: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
        for turn in range(args.turns):
            for side in args.sides:
                times[side].append(launch(args, side, turn))
                print(f"  {side:12s} {times[side][-1]['wall']:9.2f} s   {times[side][-1]['cpu']:9.2f} CPU s", flush=True)
    report(times)


def report(times: dict[str, list[dict[str, float]]]) -> None:
    """Print each side's median times, and how many times as fast as it ours is."""
    medians = {s: {kind: statistics.median(t[kind] for t in ts) for kind in ("wall", "cpu")} for s, ts in times.items()}
    print("\nside               wall s      CPU s   ours is so many times as fast: by wall, by CPU")
    for side, median in medians.items():
        ratios = "".join(f"   {median[kind] / medians['ours'][kind]:6.2f}" for kind in median) if "ours" in medians else ""
        print(f"{side:12s} {median['wall']:12.2f} {median['cpu']:10.2f}{ratios}")


def prepare(args: argparse.Namespace) -> int:
    """Write the records, and save model and tokenizer; returns the number of responses."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    lines = (
        gzip.decompress(Path(args.data).read_bytes()) if args.data.endswith(".gz") else Path(args.data).read_bytes()
    ).splitlines()
    records = [json.loads(line) for line in lines]
    records = records[:: max(1, len(records) // (args.prompts or len(records)))][: args.prompts]
    Path(args.folder, "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator((text for record in map(json.loads, lines) for text in record["responses"][:2]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=8192,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForSequenceClassification(config).save_pretrained(args.folder / "rm")
    tokenizer.save_pretrained(args.folder / "rm")
    return sum(len(record["responses"]) for record in records)


def launch(args: argparse.Namespace, side: str, turn: int) -> dict[str, float]:
    """Run one side in its processes; returns the slowest one's wall-clock and all ones' CPU seconds."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={args.processes}", "--standalone"]
    words = ["--data", args.data, "--device", args.device, "--dtype", args.dtype]
    words += ["--folder", str(args.folder), "--run_side", f"{side}@{turn}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run([sys.executable, *launcher, __file__, *words], env=environment, check=True, stderr=subprocess.DEVNULL)
    parts = [json.loads(part.read_text()) for part in sorted(args.folder.glob(f"{side}@{turn}.rank*.json"))]
    return {"wall": max(part["wall"] for part in parts), "cpu": sum(part["cpu"] for part in parts)}


def run_side(args: argparse.Namespace) -> None:
    """One process of one side: load, warm up, wait for the others, work, write down how long it took."""
    import torch

    from annotate_data.bradley_terry import BradleyTerry
    from annotate_data.work import Responses, Task
    from baton.models import devices, loading
    from baton.program import rank, world_size

    device = devices.choose_device(args.device)
    settings = loading.Settings(dtype=args.dtype)
    responses = Responses(str(args.folder / "in.jsonl"))
    side = args.run_side.split("@")[0]
    warm_up = [Task(0, "", {}, [{"role": "user", "content": "Hello"}], ["Hello " * 200], [0])] * 3
    if side == "ours":
        scorer = BradleyTerry(str(args.folder / "rm"), device, settings)
        list(scorer(warm_up))
        work = whole_stage(args, responses, scorer)
    else:
        from transformers import AutoModelForSequenceClassification

        model = loading.load(AutoModelForSequenceClassification, str(args.folder / "rm"), args.dtype).to(device)
        share = [record for position, (_, record) in enumerate(responses) if position % world_size() == rank()]
        work = pipeline_of(args, model, share) if side == "pipeline" else padded_of(args, model, share, int(side.split(":")[1]))
        with torch.inference_mode():
            for _ in range(3):
                model(torch.ones(1, 400, dtype=torch.long, device=device))
    devices.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    Path(args.folder, f"{args.run_side}.rank{rank()}.json").write_text(json.dumps(spent))


def whole_stage(args: argparse.Namespace, responses, scorer):
    """What get_rewards.py does after loading the model."""
    from annotate_data.annotate import annotate
    from baton.arguments import StageArguments
    from baton.stage import Stage

    output = args.folder / f"{args.run_side}.jsonl"
    inputs = {"dataset": args.folder / "in.jsonl", "reward_model": args.folder / "rm"}
    stage = Stage.begin("annotate", StageArguments(), output, inputs)
    return lambda: annotate(stage, responses, {"reward": lambda: scorer}, rewards_of_scores)


def rewards_of_scores(record, scores):
    """The record with its rewards, and what to summarise."""
    return {**record, "rewards": scores["reward"]}, {"rewards": scores["reward"]}


def pipeline_of(args: argparse.Namespace, model, share):
    """The pipeline, called with the texts of one prompt's responses at a time."""
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(args.folder / "rm")
    scorer = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none", batch_size=1)

    def work():
        for record in share:
            scorer([tokenizer.apply_chat_template(c, tokenize=False) for c in conversations(record)], add_special_tokens=False)

    return work


def padded_of(args: argparse.Namespace, model, share, size: int):
    """Batches of `size`, sorted by length, padded, with a mask."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.folder / "rm")
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for record in share for c in conversations(record)]
    sequences = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len, reverse=True)

    @torch.inference_mode()
    def work():
        for start in range(0, len(sequences), size):
            batch = tokenizer.pad({"input_ids": sequences[start : start + size]}, return_tensors="pt").to(model.device)
            model(**batch).logits.float().tolist()

    return work


def conversations(record) -> list:
    """The conversations of a record, each with one response."""
    return [[*record["prompt"], {"role": "assistant", "content": response}] for response in record["responses"]]


if __name__ == "__main__":
    main()
