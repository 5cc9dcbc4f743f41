"""Speed of scoring: the scorers of get_rewards.py and get_logps.py, a transformers pipeline, and padded batches.

    python benchmarks/annotation.py --data alpaca_eval_k8.jsonl.gz                              # all of it, 2 processes
    python benchmarks/annotation.py --data … --prompts 40 --repeats 3                           # a part, three times
    python benchmarks/annotation.py --data … --turns 3                                          # long prompts
    python benchmarks/annotation.py --data … --sides logps padded_logps:1                       # log-probabilities
    python benchmarks/annotation.py --data … --device cuda --processes 1 --model 1b             # on a GPU

The data file holds `prompt`, `responses` and `rewards` a line. The model is a Llama of random weights with a byte-level BPE
tokenizer, made on the spot, or that of a folder, as a reward model with a random head. The sides, each in processes of its own,
one after the other in every repeat:

    ours            get_rewards.py: from the records to the finished output, its summary included
    pipeline        transformers' text-classification pipeline with batch_size=1, one call per prompt as Online-RLHF makes them
    padded:B        batches of B, sorted by length over the whole file, padded, with a mask; tokenised before its time begins
    logps           get_logps.py, as `ours`; compared with padded_logps:B alone
    padded_logps:B  as padded:B, by a causal language model: all logits, and the log-softmax of the response's

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


MODELS = {  # hidden size, layers, heads, key heads, intermediate size, vocabulary
    "tiny": (64, 2, 4, 2, 128, 8192),
    "14m": (384, 6, 6, 6, 1024, 8192),
    "1b": (2048, 16, 32, 8, 8192, 128256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="responses, .jsonl or .jsonl.gz")
    parser.add_argument("--prompts", type=int, help="use so many prompts, spread evenly over the file (default: all)")
    parser.add_argument("--turns", type=int, default=0, help="earlier question-answer turns in every prompt")
    parser.add_argument("--model", default="14m", help=f"{', '.join(MODELS)}, or a model's folder")
    parser.add_argument("--sides", nargs="+", default=["ours", "pipeline", *(f"padded:{b}" for b in (1, 2, 4, 8, 16))])
    parser.add_argument("--repeats", type=int, default=1, help="how often each side runs; medians are compared")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens_per_batch", type=int, help="of `ours` and `logps` (default: theirs)")
    parser.add_argument("--run_side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run_side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        print(f"{prepare(args)} responses, {args.model}, {args.processes} processes, {args.device}, {args.dtype}", flush=True)
        times: dict[str, list[dict[str, float]]] = {side: [] for side in args.sides}
        for repeat in range(args.repeats):
            for side in args.sides:
                times[side].append(launch(args, side, repeat))
                print(f"  {side:15s} {times[side][-1]['wall']:9.2f} s   {times[side][-1]['cpu']:9.2f} CPU s", flush=True)
    report(times)


def report(times: dict[str, list[dict[str, float]]]) -> None:
    """Print each side's median times, and how many times as fast as it ours is."""
    medians = {s: {kind: statistics.median(t[kind] for t in ts) for kind in ("wall", "cpu")} for s, ts in times.items()}
    print("\nside                  wall s      CPU s   ours is so many times as fast: by wall, by CPU")
    for side, median in medians.items():
        ours = medians.get("logps" if "logps" in side else "ours")
        ratios = "".join(f"   {median[kind] / ours[kind]:6.2f}" for kind in median) if ours else ""
        print(f"{side:15s} {median['wall']:12.2f} {median['cpu']:10.2f}{ratios}")


def prepare(args: argparse.Namespace) -> int:
    """Write the records, and save the models `rm` and `lm` with their tokenizer; returns the number of responses."""
    opened = gzip.open if args.data.endswith(".gz") else open
    with opened(args.data, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    tokenizer = tokenizer_of(args, records)
    records = [with_turns(records, place, args.turns) for place in range(args.turns, len(records))]
    records = records[:: max(1, len(records) // (args.prompts or len(records)))][: args.prompts]
    Path(args.folder, "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    kinds = {"lm" if "logps" in side else "rm" for side in args.sides}
    for kind in kinds:
        make_model(args, kind, tokenizer).save_pretrained(args.folder / kind)
        tokenizer.save_pretrained(args.folder / kind)
    return sum(len(record["responses"]) for record in records)


def with_turns(records: list[dict], place: int, turns: int) -> dict:
    """The record at `place`, its prompt after `turns` questions with their best answers, of the records before."""
    earlier = []
    for record in records[place - turns : place]:
        best = max(range(len(record["rewards"])), key=record["rewards"].__getitem__)
        earlier += [*record["prompt"], {"role": "assistant", "content": record["responses"][best]}]
    return {**records[place], "prompt": [*earlier, *records[place]["prompt"]]}


def tokenizer_of(args: argparse.Namespace, records: list[dict]):
    """The tokenizer of the model's folder, or one that is trained on responses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if args.model not in MODELS:
        return AutoTokenizer.from_pretrained(args.model)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator((text for record in records for text in record["responses"][:2]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(args: argparse.Namespace, kind: str, tokenizer):
    """A reward model (`rm`) or a causal language model (`lm`)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    torch.manual_seed(0)
    auto_class = AutoModelForSequenceClassification if kind == "rm" else AutoModelForCausalLM
    heads = {"num_labels": 1} if kind == "rm" else {}
    dtype = getattr(torch, args.dtype)
    if args.model not in MODELS:
        return auto_class.from_pretrained(args.model, dtype=dtype, pad_token_id=tokenizer.pad_token_id, **heads)
    hidden, layers, attention_heads, key_heads, intermediate, vocabulary = MODELS[args.model]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=attention_heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        **heads,
    )
    with torch.device(args.device):
        return auto_class.from_config(config, dtype=dtype)


def launch(args: argparse.Namespace, side: str, repeat: int) -> dict[str, float]:
    """Run one side in its processes; returns the slowest one's wall-clock and all ones' CPU seconds."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={args.processes}", "--standalone"]
    words = ["--data", args.data, "--device", args.device, "--dtype", args.dtype]
    words += ["--tokens_per_batch", str(args.tokens_per_batch)] if args.tokens_per_batch else []
    words += ["--folder", str(args.folder), "--run_side", f"{side}@{repeat}"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([sys.executable, *launcher, __file__, *words], env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-5000:]}")
    parts = [json.loads(part.read_text()) for part in sorted(args.folder.glob(f"{side}@{repeat}.rank*.json"))]
    return {"wall": max(part["wall"] for part in parts), "cpu": sum(part["cpu"] for part in parts)}


def run_side(args: argparse.Namespace) -> None:
    """One process of one side: load, warm up, wait for the others, work, write down how long it took."""
    import torch

    from annotate_data.bradley_terry import BradleyTerry
    from annotate_data.causal_lm import CausalLM
    from annotate_data.work import Responses, Task
    from baton.models import devices, loading
    from baton.program import rank, world_size

    device = devices.choose_device(args.device)
    settings = loading.Settings(dtype=args.dtype, tokens_per_batch=args.tokens_per_batch)
    responses = Responses(str(args.folder / "in.jsonl"))
    name, _, size = args.run_side.split("@")[0].partition(":")
    folder = str(args.folder / ("lm" if "logps" in name else "rm"))
    if name in ("ours", "logps"):
        scorer = (BradleyTerry if name == "ours" else CausalLM)(folder, device, settings)
        list(scorer([Task(0, "", {}, [{"role": "user", "content": "Hello"}], ["Hello " * 200] * 3, [0, 1, 2])]))
        work = whole_stage(args, responses, scorer)
    else:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        auto_class = AutoModelForCausalLM if "logps" in name else AutoModelForSequenceClassification
        model = loading.load(auto_class, folder, args.dtype).to(device)
        share = [record for position, (_, record) in enumerate(responses) if position % world_size() == rank()]
        if name == "pipeline":
            work = pipeline_of(folder, model, share)
        else:
            work = (padded_logps_of if "logps" in name else padded_of)(folder, model, share, int(size))
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
    """What get_rewards.py and get_logps.py do after loading the model."""
    from annotate_data.annotate import annotate
    from baton.arguments import StageArguments
    from baton.stage import Stage

    output = args.folder / f"{args.run_side}.jsonl"
    stage = Stage.begin("annotate", StageArguments(), output, {"dataset": args.folder / "in.jsonl"})
    return lambda: annotate(stage, responses, {"score": lambda: scorer}, with_scores)


def with_scores(record, scores):
    """The record with its scores, and what to summarise."""
    return {**record, "scores": scores["score"]}, {"score": scores["score"]}


def pipeline_of(folder: str, model, share):
    """The pipeline, called with the texts of one prompt's responses at a time."""
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none", batch_size=1)

    def work():
        for record in share:
            scorer([tokenizer.apply_chat_template(c, tokenize=False) for c in conversations(record)], add_special_tokens=False)

    return work


def padded_of(folder: str, model, share, size: int):
    """Batches of `size`, sorted by length, padded, with a mask."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for record in share for c in conversations(record)]
    sequences = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len, reverse=True)

    @torch.inference_mode()
    def work():
        for start in range(0, len(sequences), size):
            batch = tokenizer.pad({"input_ids": sequences[start : start + size]}, return_tensors="pt").to(model.device)
            model(**batch).logits.float().tolist()

    return work


def padded_logps_of(folder: str, model, share, size: int):
    """The same batches through a causal language model: ln p of each response after its prompt."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences = []  # (token ids, how many of them are the prompt's)
    for record in share:
        opening = tokenizer.apply_chat_template(record["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(opening, add_special_tokens=False)["input_ids"]
        answers = tokenizer(record["responses"], add_special_tokens=False)["input_ids"]
        sequences += [([*prompt, *answer, tokenizer.eos_token_id], len(prompt)) for answer in answers]
    sequences.sort(key=lambda sequence: -len(sequence[0]))

    @torch.inference_mode()
    def work():
        for start in range(0, len(sequences), size):
            some = sequences[start : start + size]
            batch = tokenizer.pad({"input_ids": [ids for ids, _ in some]}, return_tensors="pt").to(model.device)
            logps = model(**batch).logits[:, :-1].float().log_softmax(-1)  # (B, L - 1, vocabulary)
            taken = logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
            [row[prompt - 1 : len(ids) - 1].sum().item() for row, (ids, prompt) in zip(taken, some, strict=True)]

    return work


def conversations(record) -> list:
    """The conversations of a record, each with one response."""
    return [[*record["prompt"], {"role": "assistant", "content": response}] for response in record["responses"]]


if __name__ == "__main__":
    main()
