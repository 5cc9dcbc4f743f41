"""Online RL: a step of ppo/run_ppo.py against its floor and against TRL's trainers, samples a second; a transfer of weights.

    python benchmarks/ppo.py --model_path runs/quickstart/sft --prompts_path runs/quickstart/data/prompts_round1.jsonl
    python benchmarks/ppo.py --model_path … --prompts_path … --sides ours ours_stale floor        # no TRL
    python benchmarks/ppo.py --model_path … --prompts_path … --critic --sides ours floor trl_ppo --trl_ppo_python PYTHON
    python benchmarks/ppo.py --model_path … --transfer                                             # of the weights alone
    python benchmarks/ppo.py --model 1b --device cuda --rollouts --critic                          # one GPU, no vLLM

All responses have `--max_new_tokens` tokens, whatever they say, so that all sides compute the same; the reward is a rule.
`floor` is what nothing can do without: bare `vllm.LLM.generate` of the same prompts, and bare packed passes over such rows
(reference, with --critic the critic's, then forward, backward and AdamW), without servers, files, rewards or transfers.
`ours_stale` samples a step while the one before it trains (`--staleness 1`): its bar is the longer half of the floor, that of
`ours` both halves together. On a CPU the two halves share the cores, so that bar is out of reach there.
`trl_rloo` is TRL's RLOOTrainer as its documentation starts it here: generation by Transformers in the trainer's process.
`trl_ppo` (with --critic) is TRL's PPOTrainer in the same way: trl_ppo.py says which environment it needs.

`--transfer` sends the model's weights to one server as the training does, and in the bare way of bare_weights.py, in turn:
seconds of both by the trainer's clock, how long the server was paused, and what the bare way takes in the server's process.

Run it in the training environment; the inference environment must be there too. `--rollouts` times the training half alone, on
made-up samples of a model of random weights, and reports MFU.
"""

import argparse
import dataclasses
import inspect
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose ppo.py would hide the stage

PROMPT = 128  # most tokens of a prompt


def even(prompts, responses, records):
    """The share of letters that come early in the alphabet."""
    return [sum("a" <= letter <= "m" for letter in text) / (len(text) + 1) for text in responses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", help="the policy's folder")
    parser.add_argument("--prompts_path", help="prompts, .jsonl")
    parser.add_argument("--sides", nargs="+", default=["ours", "floor", "trl_rloo"])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side; the median counts")
    parser.add_argument("--steps", type=int, default=4, help="of each turn; the first does not count")
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--K", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--critic", action="store_true", help="PPO instead of RLOO; TRL's side is then trl_ppo")
    parser.add_argument("--trl_ppo_python", help="Python of an environment with TRL 1.12.0, for the side trl_ppo")
    parser.add_argument("--transfer", action="store_true", help="time transfers of the weights of --model_path to one server")
    parser.add_argument("--model", choices=["tiny", "1b"], default="1b", help="shape for --rollouts")
    parser.add_argument("--device", default="cpu", help="for --rollouts and --transfer")
    parser.add_argument("--rollouts", action="store_true", help="time the training on made-up samples")
    parser.add_argument("--run_side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rollouts:
        print(json.dumps(on_rollouts(args)))
        return
    if args.run_side:
        print(json.dumps(SIDES[args.run_side](args, args.folder)))
        return
    if args.transfer and args.model_path:
        print(json.dumps(of_transfers(args)))
        return
    if not (args.model_path and args.prompts_path):
        parser.error("--model_path and --prompts_path are needed")
    if "trl_ppo" in args.sides and not (args.critic and args.trl_ppo_python):
        parser.error("the side trl_ppo needs --critic and --trl_ppo_python")
    turns: dict[str, list[dict]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rules.py").write_text(inspect.getsource(even))
        for _ in range(args.repeats):
            for side in args.sides:
                command = [sys.executable, __file__, *sys.argv[1:], "--run_side", side, "--folder", folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                turns[side].append(json.loads(done.stdout.splitlines()[-1]))
    report(args, turns)


def report(args: argparse.Namespace, turns: dict[str, list[dict]]) -> None:
    """A line for each side with the ratios to the others, and what `ours` and `ours_stale` take in units of their bars."""
    samples = args.prompts * args.K
    seconds = {side: statistics.median(turn["seconds"] for turn in found) for side, found in turns.items()}
    for side, found in turns.items():
        rest = {name: round(statistics.median(turn[name] for turn in found), 2) for name in found[0] if name != "seconds"}
        ratios = "".join(f", {seconds[other] / seconds[side]:.2f} x {other}" for other in seconds if other != side)
        print(f"{side}: {seconds[side]:.2f} s a step, {samples / seconds[side]:.1f} samples/s{ratios} {rest or ''}")
    halves = [(turn["generating"], turn["training"]) for turn in turns.get("floor", ())]
    for side, what, bar in (("ours", "both halves", sum), ("ours_stale", "the longer half", max)):
        if side in turns and halves:
            least = statistics.median(map(bar, halves))
            print(f"bar of {side}: {least:.2f} s, {what} of the floor; {side} takes {seconds[side] / least:.2f} times that")


def ours(args: argparse.Namespace, folder: Path, staleness: int = 0) -> dict:
    """The median step of run_ppo.py, by its own clock."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "policy"
    settings = {
        "advantage_estimator": "gae" if args.critic else "rloo",
        "rollout_batch_size": args.prompts, "K": args.K, "max_new_tokens": args.max_new_tokens, "total_steps": args.steps,
        "max_prompt_length": PROMPT, "staleness": staleness, "save_steps": 10_000, "gradient_checkpointing": "false",
        "server_dtype": "float32", "min_new_tokens": args.max_new_tokens, "learning_rate": 1e-6,
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    data = ["--model_name_or_path", args.model_path, "--dataset_name_or_path", args.prompts_path, "--output_dir", str(output)]
    scorer = ["--scorer", f"function:{folder}/rules.py:even"]
    subprocess.run([sys.executable, "ppo/run_ppo.py", *data, *flags, *scorer], check=True, cwd=ROOT, stdout=sys.stderr)
    lines = [json.loads(line) for line in Path(f"{output}.metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][1:-1]  # the last step sends no weights
    names = ("seconds", "waited_seconds", "training_seconds", "sync_seconds")
    return {name: statistics.median(step[name] for step in steps) for name in names}


def floor(args: argparse.Namespace, folder: Path) -> dict:
    """Bare generation and bare passes, the median of the steps."""
    prompts = prompt_ids(args)
    inference = str(Path(sys.executable).parents[2] / "inference/bin/python")
    sizes = map(str, (args.K, args.max_new_tokens, args.steps))
    bare = [inference, "-c", BARE_VLLM, args.model_path, json.dumps(prompts), *sizes]
    done = subprocess.run(bare, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    generating = json.loads(done.stdout.splitlines()[-1])
    training = statistics.median(bare_training(args, prompts))
    return {"seconds": generating + training, "generating": generating, "training": training}


BARE_VLLM = """
import json, os, statistics, sys, time
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
from vllm import LLM, SamplingParams
model, prompts, n, tokens, steps = sys.argv[1], json.loads(sys.argv[2]), *map(int, sys.argv[3:])
llm = LLM(model, enforce_eager=True, dtype="float32", max_model_len=max(map(len, prompts)) + tokens)
params = SamplingParams(n=n, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
took = []
for _ in range(steps):
    begun = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    took.append(time.perf_counter() - begun)
print(json.dumps(statistics.median(took[1:])))
"""


def prompt_ids(args: argparse.Namespace) -> list[list[int]]:
    """The token ids of the first prompts."""
    from baton.models.templates import load_tokenizer, prompt_token_ids
    from baton.prompts import PromptSet

    tokenizer = load_tokenizer(args.model_path)
    first = itertools.islice(PromptSet(args.prompts_path).shard(0, 1), args.prompts)
    return [prompt_token_ids(tokenizer, messages, where) for _, where, _, messages in first]


def bare_training(args: argparse.Namespace, prompts: list[list[int]]) -> list[float]:
    """Seconds of each step's passes over packed rows, all of the models on one process; the first step is left out."""
    from transformers import AutoModelForCausalLM

    from baton.models import forward
    from baton.models.attention import NAME
    from baton.models.trees import pack
    from baton.online.models import load_critic, values

    def load():
        return AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32, attn_implementation=NAME)

    actor, reference = load(), load()
    critic = load_critic(args.model_path, torch.float32, 0) if args.critic else None
    trained = [*actor.parameters(), *(critic.parameters() if critic is not None else ())]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    sequences = [(ids, ids_of(args.max_new_tokens, seed)) for ids in prompts for seed in range(args.K)]
    rows, _ = pack(sequences, 8192)
    seconds = []
    for _ in range(args.steps):
        begun = time.perf_counter()
        for row in rows:
            forward.logps(reference, row)
            if critic is not None:
                with torch.no_grad():
                    values(critic, row)
        for row in rows:
            loss = forward.row_scores(actor, row).log_probs.mean()
            if critic is not None:
                loss = loss + values(critic, row).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def ids_of(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(10, 200) for _ in range(count)]


def trl_rloo(args: argparse.Namespace, folder: Path) -> dict:
    """The median step of TRL's RLOOTrainer."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    from baton.prompts import PromptSet

    took: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            took.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    prompts = [{"prompt": messages} for *_, messages in PromptSet(args.prompts_path).shard(0, 1)]
    samples = args.prompts * args.K
    config = RLOOConfig(
        str(folder / "trl"), per_device_train_batch_size=samples, num_generations=args.K, max_steps=args.steps,
        max_completion_length=args.max_new_tokens, learning_rate=1e-6, bf16=False, use_cpu=True, report_to="none",
        gradient_checkpointing=False, save_strategy="no", logging_steps=100, beta=0.01, disable_tqdm=True,
        generation_kwargs={"min_new_tokens": args.max_new_tokens},
    )  # fmt: skip

    def reward(completions, **_):
        return even(None, [completion[0]["content"] for completion in completions], None)

    trainer = RLOOTrainer(
        args.model_path, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {"seconds": statistics.median(after - before for before, after in itertools.pairwise(took))}


def trl_ppo(args: argparse.Namespace, folder: Path) -> dict:
    """The median step of TRL's PPOTrainer, in its environment."""
    given = {
        "model": str(Path(args.model_path).resolve()), "prompts": prompt_ids(args), "K": args.K, "tokens": args.max_new_tokens,
        "steps": args.steps, "device": "cpu", "output": str(folder / "trl_ppo"),
    }  # fmt: skip
    file = folder / "trl_ppo.json"
    file.write_text(json.dumps(given), encoding="utf-8")
    command = [args.trl_ppo_python, str(ROOT / "benchmarks/trl_ppo.py"), str(file)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def of_transfers(args: argparse.Namespace) -> dict:
    """Medians of transfers to one server in both ways, in turn; the first of each, which connects, does not count."""
    from transformers import AutoModelForCausalLM

    from baton.launch import gpus
    from baton.online.models import weights_for_servers
    from baton.servers import own
    from baton.servers.weights import Transfer

    ids = gpus.visible() if args.device == "cuda" else []
    backend = "nccl" if len(ids) > 1 else "gloo"
    model = AutoModelForCausalLM.from_pretrained(args.model_path, dtype=torch.float32).to(args.device)
    settings = {"dtype": "bfloat16" if ids else "float32", "max_model_len": 256}
    (wanted,) = own.policy_servers(args.model_path, [ids[-1:]], settings, weights=True)
    words = ["bare_weights.Extension" if word.endswith(".Extension") else word for word in wanted.words]
    more = {"PYTHONPATH": f"{ROOT}:{ROOT}/benchmarks"}
    wanted = dataclasses.replace(wanted, words=tuple(words), variables={**wanted.variables, **more})
    times: dict[str, list[float]] = {"ours": [], "paused": [], "bare": [], "bare_in_server": []}
    with tempfile.TemporaryDirectory() as folder, own.running([wanted], Path(folder) / "servers") as (server,):
        transfer = Transfer([server.url], server.api_key, device=args.device, backend=backend)
        marks = clocked(transfer.links[0])
        bare = Bare(transfer.links[0], args.device, backend)
        for turn in range(args.repeats + 1):
            found = {"ours": transfer.send(weights_for_servers(model), turn), "paused": marks["resume"] - marks["pause"]}
            found |= bare.send(weights_for_servers(model), getattr(torch, settings["dtype"]))
            for name, value in found.items() if turn else ():
                times[name].append(value)
        transfer.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    held = sum(tensor.numel() for _, tensor in weights_for_servers(model)) * getattr(torch, settings["dtype"]).itemsize
    return {"megabytes": held / 2**20, "ratio": medians["ours"] / medians["bare"], **medians}


def clocked(link) -> dict[str, float]:
    """When a `Link` begins to pause its server, and when the server goes on, by the last of each."""
    marks: dict[str, float] = {}
    pause, resume = link.pause, link.resume

    def noted_pause() -> None:
        marks["pause"] = time.perf_counter()
        pause()

    def noted_resume(version: int) -> None:
        resume(version)
        marks["resume"] = time.perf_counter()

    link.pause, link.resume = noted_pause, noted_resume
    return marks


class Bare:
    """The trainer's side of bare_weights.py."""

    def __init__(self, link, device: str, backend: str, seconds: float = 60.0):
        from baton.servers import groups

        self.link, self.place = link, torch.device(device if backend == "nccl" else "cpu")
        store, port = groups.listen("127.0.0.1", seconds)
        meeting = {"host": "127.0.0.1", "port": port, "backend": backend, "size": 2, "seconds": seconds}
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(link.call_workers, "join_bare", **meeting)
            self.group = groups.join(store, "bare", 0, 2, self.place, "127.0.0.1", seconds)
            told.result()

    def send(self, weights, dtype: torch.dtype) -> dict[str, float]:
        """Seconds of one transfer, by this clock and in the server."""
        from baton.servers import groups

        begun = time.perf_counter()
        named = [(name, tensor.to(self.place, dtype)) for name, tensor in weights]
        flat = torch.cat([tensor.reshape(-1) for _, tensor in named])
        names, shapes = [name for name, _ in named], [list(tensor.shape) for _, tensor in named]
        with ThreadPoolExecutor(1) as pool:
            kind = str(dtype).removeprefix("torch.")
            told = pool.submit(self.link.call_workers, "load_bare", names=names, shapes=shapes, dtype=kind)
            groups.broadcast(self.group, flat).wait()
            (in_server,) = told.result()
        return {"bare": time.perf_counter() - begun, "bare_in_server": in_server}


def on_rollouts(args: argparse.Namespace) -> dict:
    """Seconds, tokens a second and MFU of the training half on made-up samples."""
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    from baton.models.attention import NAME
    from baton.online.learner import Learner, optimizer_of
    from baton.online.models import Models
    from baton.online.samples import Samples
    from baton.training.metrics import peak_flops
    from ppo.algorithm import Algorithm
    from ppo.run_ppo import Arguments

    sizes = {"tiny": (64, 2, 2, 1, 128, 1024), "1b": (2048, 16, 32, 8, 8192, 128256)}[args.model]
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    shape = LlamaConfig(
        **dict(zip(names, sizes, strict=True)), tie_word_embeddings=True, attn_implementation=NAME, num_labels=1
    )
    shape.pad_token_id = 0
    with torch.device(args.device):
        actor, reference = (AutoModelForCausalLM.from_config(shape, dtype=torch.float32) for _ in range(2))
        critic = AutoModelForSequenceClassification.from_config(shape, dtype=torch.float32) if args.critic else None
    reference = reference.to(torch.bfloat16 if args.device == "cuda" else torch.float32).eval()
    models = Models(actor, critic)
    for model in (actor, critic):
        if model is not None and args.model == "1b":
            model.gradient_checkpointing_enable({"use_reentrant": False})
    mixed = "bf16" if args.device == "cuda" else "no"
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=mixed)
    learner = Learner(models, optimizer_of(models, 1e-6, 1e-6), accelerator, lambda *_: 1.0, 16384, 1.0)
    how = {"K": args.K, "advantage_estimator": "gae" if args.critic else "rloo", "max_new_tokens": args.max_new_tokens}
    algorithm = Algorithm(Arguments.model_construct(**how, whiten_advantages=True), learner, reference)
    seconds, flops = [], []
    for step in range(args.steps):
        records = [made_up(number, args) for number in range(args.prompts)]
        begun = time.perf_counter()
        algorithm.step(records, Samples.of(records), step)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        flops.append(learner.taken()[0])
    median, tokens = statistics.median(seconds[1:]), args.prompts * args.K * args.max_new_tokens
    peak = peak_flops(accelerator.device)
    found = {"seconds": median, "response_tokens_per_second": tokens / median, "tflops": flops[-1] / median / 1e12}
    return found | ({"mfu": flops[-1] / median / peak} if peak else {})


def made_up(number: int, args: argparse.Namespace) -> dict:
    ids = [ids_of(args.max_new_tokens, number * 100 + sample) for sample in range(args.K)]
    return {
        "id": str(number), "prompt_token_ids": ids_of(256, -1 - number), "responses": [""] * args.K, "response_token_ids": ids,
        "response_logps": [[-3.0] * args.max_new_tokens] * args.K, "finish_reasons": ["stop"] * args.K,
        "rewards": [random.Random(number + sample).random() for sample in range(args.K)],
    }  # fmt: skip


SIDES = {
    "ours": ours, "floor": floor, "trl_rloo": trl_rloo, "trl_ppo": trl_ppo,
    "ours_stale": lambda args, folder: ours(args, folder, staleness=1),
}  # fmt: skip


if __name__ == "__main__":
    main()
