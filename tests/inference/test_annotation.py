"""Annotation: the same rewards however the work is cut up, nothing scored twice, bad input refused before a model loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
REWARDS = ROOT / "annotate_data" / "get_rewards.py"
LOGPS = ROOT / "annotate_data" / "get_logps.py"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with a tiny random reward model `rm` and language models `lm`, `lm2`, over a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("models")
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(special + alphabet)}
    core = Tokenizer(tokenizer_models.BPE(words, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    for seed, name in enumerate(["lm", "lm2", "rm"]):
        torch.manual_seed(seed)
        if name == "rm":
            config.num_labels = 1
        model = LlamaForSequenceClassification(config) if name == "rm" else LlamaForCausalLM(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generated(count, K=3):
    """Records of very different lengths."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {i}: " + "why? " * (i * 7 % 11)}],
            "responses": [f"Answer {k} to {i}. " + "Because. " * ((i * 5 + k * 3) % 17) for k in range(K)],
            "source": {"number": i},
        }
        for i in range(count)
    ]


def command(program, processes=1):
    if processes == 1:
        return [sys.executable, str(program)]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        "--standalone",
        str(program),
    ]


def flags(**values):
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(program, processes=1, check=True, **values):
    """Run a program to its end; its log is in the result's stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command(program, processes), *flags(**values)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def annotated(models, tmp_path_factory):
    """Input, output and log of one plain run over 23 prompts."""
    folder = tmp_path_factory.mktemp("annotated")
    source = write(folder / "in.jsonl", generated(23))
    done = run(
        REWARDS,
        dataset_name_or_path=source,
        output_dir=folder / "out.jsonl",
        reward_name_or_path=models / "rm",
    )
    return source, folder / "out.jsonl", done.stderr


def rewards_in(path):
    return [reward for record in read(path) for reward in record["rewards"]]


def test_the_output_is_the_input_in_order_with_ids_and_rewards(annotated):
    source, output, _ = annotated
    for given, made in zip(read(source), read(output), strict=True):
        assert given == {key: value for key, value in made.items() if key not in ("id", "rewards")}
        assert len(made["rewards"]) == len(given["responses"])
    assert len(set(rewards_in(output))) > 60
    assert len({record["id"] for record in read(output)}) == 23


def test_rewards_are_those_of_the_model_called_on_each_conversation_alone(annotated, models):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(models / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "rm")
    for record in read(annotated[1])[:6]:
        for response, reward in zip(record["responses"], record["rewards"], strict=True):
            messages = [*record["prompt"], {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                assert model(ids).logits.item() == pytest.approx(reward, abs=1e-5)


@pytest.mark.parametrize(("processes", "tokens"), [(2, 2048), (1, 1), (1, 100_000)])
def test_rewards_depend_on_neither_processes_nor_batches(annotated, models, tmp_path, processes, tokens):
    source, output, _ = annotated
    done = run(
        REWARDS, processes, dataset_name_or_path=source, output_dir=tmp_path / "out.jsonl",
        reward_name_or_path=models / "rm", tokens_per_batch=tokens,
    )  # fmt: skip
    assert f"processes={processes}" in done.stderr
    assert rewards_in(tmp_path / "out.jsonl") == pytest.approx(rewards_in(output), abs=1e-5)
    assert [record["id"] for record in read(tmp_path / "out.jsonl")] == [record["id"] for record in read(output)]


def test_more_processes_than_records(models, tmp_path):
    source = write(tmp_path / "in.jsonl", generated(1))
    run(
        REWARDS,
        2,
        dataset_name_or_path=source,
        output_dir=tmp_path / "out.jsonl",
        reward_name_or_path=models / "rm",
    )
    assert len(read(tmp_path / "out.jsonl")) == 1


def test_killed_and_restarted_with_other_processes_nothing_is_scored_twice(models, tmp_path):
    source, output = write(tmp_path / "in.jsonl", generated(150)), tmp_path / "out.jsonl"
    values = {
        "dataset_name_or_path": source,
        "output_dir": output,
        "reward_name_or_path": models / "rm",
        "tokens_per_batch": 1,
    }
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen(
        [*command(REWARDS, 2), *flags(**values)],
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    parts = [tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial1"]
    while not all(part.exists() and part.stat().st_size > 2000 for part in parts):
        assert first.poll() is None, "the first run ended before it could be killed"
    processes = [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)
    first.wait()
    lines = [part.read_bytes().count(b"]\n") for part in parts]
    assert not output.exists()
    assert 0 < sum(lines) < 450
    done = run(REWARDS, 1, **values)
    assert f"{sum(lines)} of 450 scores are done already" in done.stderr
    scores = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["scored_by_this_run"]
    assert scores == 450 - sum(lines)
    assert [record["source"]["number"] for record in read(output)] == list(range(150))
    assert not list(tmp_path.glob("*.partial*"))


def test_a_second_run_is_up_to_date_at_once(annotated, models):
    source, output, _ = annotated
    before = output.read_bytes()
    done = run(REWARDS, dataset_name_or_path=source, output_dir=output, reward_name_or_path=models / "rm")
    assert "up to date" in done.stderr
    assert "runs on" not in done.stderr
    assert output.read_bytes() == before


def test_long_conversations_lose_their_beginning_and_are_named(models, tmp_path):
    records = [
        {"prompt": "word " * 200, "responses": ["Good.", "Bad."]},
        {"prompt": "Hi", "responses": ["Good.", "Bad."]},
    ]
    source = write(tmp_path / "in.jsonl", records)
    done = run(
        REWARDS,
        dataset_name_or_path=source,
        output_dir=tmp_path / "out.jsonl",
        reward_name_or_path=models / "rm",
        max_length=64,
    )
    long, _ = read(tmp_path / "out.jsonl")
    assert "2 responses truncated" in done.stderr
    assert long["id"] in done.stderr
    (noted,) = json.loads((tmp_path / "out.jsonl.summary.json").read_text())["noted"].values()
    assert noted == {"responses": 2, "prompts": [long["id"]]}


def test_the_summary_says_what_the_rewards_look_like(annotated):
    import numpy as np

    _, output, _ = annotated
    summary = json.loads(Path(f"{output}.summary.json").read_text())["rewards"]
    rewards = np.array([record["rewards"] for record in read(output)])
    lengths = np.array([[len(response) for response in record["responses"]] for record in read(output)])
    assert summary["mean"] == pytest.approx(rewards.mean())
    assert summary["best_of_K_mean"] == pytest.approx(rewards.max(1).mean())
    assert summary["spread_within_prompts"] == pytest.approx(rewards.std(1).mean())
    assert summary["correlation_with_length"] == pytest.approx(np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1])
    assert summary["share_of_ties"] == 0


def test_log_probabilities_are_those_of_the_model(models, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "lm")
    records = generated(7)
    for record in records[:3]:  # as sampled: the end of turn where the policy stopped, none where it was cut off
        ids = [tokenizer(text)["input_ids"] for text in record["responses"]]
        record["response_token_ids"] = [ids[0] + [2], ids[1], ids[2] + [2]]
        record["finish_reasons"] = ["stop", "length", "stop"]
    source, output = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    values = {
        "dataset_name_or_path": source,
        "models": [f"policy={models / 'lm'}", f"initial={models / 'lm2'}"],
    }
    run(LOGPS, output_dir=output, **values)
    made = read(output)
    for name, path in (("policy", "lm"), ("initial", "lm2")):
        model = AutoModelForCausalLM.from_pretrained(models / path).eval()
        for record in made:
            assert record["source"] == records[made.index(record)]["source"]
            for k, response in enumerate(record["responses"]):
                prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
                ids = record.get("response_token_ids", [None] * 3)[k] or [
                    *tokenizer(response)["input_ids"],
                    2,
                ]
                with torch.no_grad():
                    logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
                expected = sum(logps[len(prompt) + t - 1, token].item() for t, token in enumerate(ids))
                assert record["logps_by"][name][k] == pytest.approx(expected, abs=1e-3)
    run(LOGPS, 2, output_dir=tmp_path / "two.jsonl", tokens_per_batch=3000, **values)
    for one, two in zip(made, read(tmp_path / "two.jsonl"), strict=True):
        for name in ("policy", "initial"):
            assert one["logps_by"][name] == pytest.approx(two["logps_by"][name], abs=1e-3)


GOOD = {"prompt": "Hello", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no records"),
        ([json.dumps(GOOD), "{not json"], "in.jsonl:2: not JSON"),
        ([json.dumps({"prompt": "Hello"})], "in.jsonl:1: `responses` must be a list"),
        ([json.dumps({"responses": ["a"]})], "in.jsonl:1: the record has no `prompt`"),
        (
            [json.dumps(GOOD), json.dumps({**GOOD, "responses": ["a"]})],
            "in.jsonl:2: 1 `responses`, but --K 2",
        ),
        (
            [json.dumps({**GOOD, "finish_reasons": ["stop"]})],
            "in.jsonl:1: `finish_reasons` must hold one entry",
        ),
    ],
)
def test_bad_records_are_refused_by_line(models, tmp_path, lines, message):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    values = {
        "dataset_name_or_path": source,
        "output_dir": tmp_path / "o.jsonl",
        "reward_name_or_path": models / "rm",
        "K": 2,
    }
    done = run(REWARDS, check=False, **values)
    assert done.returncode == 2
    assert message in done.stderr
    assert "runs on" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o.jsonl").exists()


def test_bad_arguments_are_refused(models, tmp_path):
    source = write(tmp_path / "in.jsonl", [GOOD])
    good = {
        "dataset_name_or_path": source,
        "output_dir": tmp_path / "o.jsonl",
        "reward_name_or_path": models / "rm",
    }
    for changes, message in [
        ({"reward_name_or_path": tmp_path / "nothing"}, "nothing: no such folder"),
        ({"reward_name_or_path": models / "lm"}, "not a Bradley-Terry reward model"),
        ({"output_dir": tmp_path}, "is a folder"),
        ({"dataset_name_or_path": tmp_path / "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"tokens_per_bach": 10}, "did you mean `tokens_per_batch`?"),
        ({"K": 0}, "`K`"),
        ({"chat_template": tmp_path / "absent.jinja"}, "absent.jinja"),
    ]:
        done = run(REWARDS, check=False, **{**good, **changes})
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "runs on" not in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("o.jsonl"))


def test_a_reward_model_without_chat_template_says_how_to_give_one(models, tmp_path):
    import shutil

    plain = shutil.copytree(models / "rm", tmp_path / "rm")
    for file in plain.glob("chat_template*"):
        file.unlink()
    source = write(tmp_path / "in.jsonl", [GOOD])
    values = {
        "dataset_name_or_path": source,
        "output_dir": tmp_path / "o.jsonl",
        "reward_name_or_path": plain,
    }
    done = run(REWARDS, check=False, **values)
    assert done.returncode == 2
    assert "give one as a Jinja file with --chat_template" in done.stderr
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    run(REWARDS, chat_template=tmp_path / "t.jinja", **values)


def test_a_launcher_that_starts_fewer_processes_than_told_is_an_error(models, tmp_path):
    source = write(tmp_path / "in.jsonl", [GOOD])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        str(REWARDS),
    ]
    values = flags(dataset_name_or_path=source, output_dir=tmp_path / "o.jsonl", reward_name_or_path=models / "rm")
    done = subprocess.run([*launch, *values], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "told to start 2 processes but started 1" in done.stderr


def test_a_reward_that_is_not_a_number_names_the_prompt(models, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(models / "rm")
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(models / "rm").save_pretrained(tmp_path / "rm")
    source = write(tmp_path / "in.jsonl", [{**GOOD, "id": "the-id"}])
    done = run(
        REWARDS,
        check=False,
        dataset_name_or_path=source,
        output_dir=tmp_path / "o.jsonl",
        reward_name_or_path=tmp_path / "rm",
    )
    assert done.returncode == 2
    assert "prompt the-id: reward gave nan" in done.stderr
