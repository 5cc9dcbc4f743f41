"""What is trained in float32 learns and starts at the reference, and is written in the dtype that it should have."""

import json
import logging
import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from baton.preferences import preference_records
from baton.prompts import read_records
from baton.stage import Stage
from baton.training.adapters import LoraArguments, merge_adapter
from baton.training.config import trainer_config
from tests.programs import ROOT, launch, read_jsonl, run_program

SMALL = ["--use_cpu", "true", "--max_length", 128, "--gradient_checkpointing", "false", "--logging_steps", 1]
BATCH = ["--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1]
STEPS = 16


@pytest.fixture(scope="module")
def bf16_base(task, tmp_path_factory):
    """The task's base model as most models are published, in bfloat16."""
    folder = tmp_path_factory.mktemp("bf16") / "base"
    AutoModelForCausalLM.from_pretrained(task / "base", dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(task / "base").save_pretrained(folder)
    return folder


def train(program, model, data, output, *words):
    """Run a training program of whose steps the precision and the learning rate are the `words`' own."""
    own = ["--model_name_or_path", model, "--dataset_name_or_path", data, "--output_dir", output]
    policy = ["--ref_model", model, "--max_prompt_length", 64] if program.startswith("dpo") else []
    done = run_program(program, *words, *own, *policy, *SMALL, *BATCH)
    assert done.returncode == 0, done.stderr
    return done


def response_logps(model, prompts, responses, tokenizer=None):
    """Summed log-probability of each response under a model, or the one in a folder, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logps = []
    for prompt, response in zip(prompts, responses, strict=True):
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([before + tokenizer(response, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        logps.append(scores.gather(1, ids[0, len(before) :, None]).sum())
    return torch.stack(logps)


def margin(model, pairs, tokenizer=None):
    """Mean of log p(chosen) - log p(rejected), in nats."""
    prompts, sides = [pair["prompt"] for pair in pairs], ("chosen", "rejected")
    chosen, rejected = (response_logps(model, prompts, [pair[side] for pair in pairs], tokenizer) for side in sides)
    return (chosen - rejected).mean().item()


@torch.no_grad()
def reward_margin(model, pairs, tokenizer):
    """Mean reward of the chosen responses minus that of the rejected ones."""
    tokenizer, margins = AutoTokenizer.from_pretrained(tokenizer), []
    for pair in pairs:
        conversations = [[*pair["prompt"], {"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")]
        ids = [torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)]) for turns in conversations]
        chosen, rejected = (model(each).logits.item() for each in ids)
        margins.append(chosen - rejected)
    return sum(margins) / len(margins)


def first_loss(stderr):
    """The loss of the first step."""
    return float(re.search(r"step 1: loss ([0-9.]+),", stderr)[1])


def changed_share(before, after):
    """The share of the weights between embedding and head that differ; embeddings of words that are not seen never do."""
    before, after = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    names = [name for name in before if ".layers." in name]
    different = sum((before[name].float() != after[name].float()).sum().item() for name in names)
    return different / sum(before[name].numel() for name in names)


# The shipped settings


def recipe_words(recipe):
    """The words with which scripts/run_loop.sh has a recipe train: its YAML file, and its arguments over that."""
    script = (
        'DPO_CONFIG=configs/training.yaml DPO_ARGS=() RUN_DIR=run; source "$1"; printf "%s\\n" "$DPO_CONFIG" "${DPO_ARGS[@]}"'
    )
    done = subprocess.run(["bash", "-c", script, "bash", recipe], capture_output=True, text=True, check=True)
    return done.stdout.split()


# Those whose DPO loss of a pair begins at ln 2; tests/contract/test_coming_from.py looks at the settings of the others.
OTHERS = ("\nTRAINER=", "--loss_type", "--length_alpha", "--use_weighting")
RECIPES = {
    path.stem: path
    for path in sorted(ROOT.glob("configs/recipes/*.env"))
    if not any(word in path.read_text() for word in OTHERS)
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_policy_moves_with_the_precision_and_the_learning_rate_of_each_recipe(name, bf16_base, annotated, tmp_path):
    config, *words = recipe_words(RECIPES[name])
    keep = ["--export_dtype", "float32", "--max_steps", STEPS, "--save_steps", STEPS]
    done = train("dpo_iteration/run_dpo.py", bf16_base, annotated, tmp_path / "policy", config, *words, *keep)
    assert first_loss(done.stderr) == pytest.approx(math.log(2), abs=1e-3)
    pairs = read_jsonl(tmp_path / "policy.pairs.jsonl")
    assert changed_share(bf16_base, tmp_path / "policy") > 0.95
    assert margin(tmp_path / "policy", pairs) > margin(bf16_base, pairs) + 0.003


PROGRAMS = {
    "sft": ("sft/run_sft.py", "data/sft.jsonl"),
    "rm": ("reward_model/run_rm.py", "data/rm_train.jsonl"),
    "kto": ("dpo_iteration/run_kto.py", "annotated.jsonl"),
    "training": ("dpo_iteration/run_dpo.py", "annotated.jsonl"),
}


@pytest.fixture(scope="module")
def exports(bf16_base, task, annotated, tmp_path_factory):
    """Of each program, what its shipped YAML file trains: folders `float32` and `checkpoint`, after the options' names.

    The second is of the same training, less its export: the first one's checkpoint, under its name.
    """
    made = {}

    def export(name):
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            program, data = PROGRAMS[name]
            for dtype in ("float32", "checkpoint"):
                words = [f"configs/{name}.yaml", "--max_steps", STEPS, "--save_steps", STEPS, "--export_dtype", dtype]
                train(program, bf16_base, task / data, folder / dtype, *words)
        return made[name]

    return export


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_model_moves_with_the_precision_and_the_learning_rate_of_each_training_configuration(name, exports, bf16_base, task):
    trained = exports(name) / "float32"
    assert changed_share(bf16_base, trained) > 0.95
    if name == "rm":
        model = AutoModelForSequenceClassification.from_pretrained(trained, dtype=torch.float32)
        pairs = [pair for _, pair in preference_records(read_records(str(task / "data/rm_train.jsonl"), "train"))][:40]
        after = reward_margin(model, pairs, trained)
        model.load_state_dict(load_file(bf16_base / "model.safetensors"), strict=False)  # all but the new head
        assert after > reward_margin(model, pairs, trained)
    elif name == "sft":
        records = read_jsonl(task / "data/sft.jsonl")[:20]
        prompts, responses = ([record[key] for record in records] for key in ("prompt", "response"))
        gain = response_logps(trained, prompts, responses) - response_logps(bf16_base, prompts, responses)
        assert gain.mean() > 0.1
    else:
        records = read_jsonl(task / "annotated.jsonl")
        best = [max(zip(r["rewards"], r["responses"], strict=True))[1] for r in records]
        worst = [min(zip(r["rewards"], r["responses"], strict=True))[1] for r in records]
        pairs = [{"prompt": r["prompt"], "chosen": c, "rejected": d} for r, c, d in zip(records, best, worst, strict=True)]
        assert margin(trained, pairs) > margin(bf16_base, pairs) + 0.001


# The export


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_bf16_checkpoint_gives_a_bf16_model_and_float32_on_request_and_the_loss_of_it_is_said(name, exports, bf16_base):
    folder, start = exports(name), load_file(bf16_base / "model.safetensors")
    exact, rounded = (load_file(folder / dtype / "model.safetensors") for dtype in ("float32", "checkpoint"))
    assert exact.keys() == rounded.keys()
    for dtype, tensors in ((torch.float32, exact), (torch.bfloat16, rounded)):
        path = folder / ("float32" if dtype == torch.float32 else "checkpoint")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert json.loads((path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert all(torch.equal(exact[key].bfloat16(), rounded[key]) for key in exact)

    known = [key for key in exact if key in start]
    assert set(exact) - set(known) == ({"score.weight"} if name == "rm" else set())
    lost, update, changed = (
        torch.cat([difference(key).flatten() for key in known])
        for difference in (
            lambda key: rounded[key].double() - exact[key].double(),
            lambda key: exact[key].double() - start[key].double(),
            lambda key: (rounded[key] != start[key]).double(),
        )
    )
    manifests = [json.loads((folder / f"{dtype}.manifest.json").read_text())["metrics"] for dtype in ("float32", "checkpoint")]
    share = (lost.norm() / update.norm()).item()
    assert 0.05 < share < 1.1
    assert [m["export_lost_in_16_bits"] for m in manifests] == pytest.approx([share, share], rel=1e-3)
    assert [m["export_lost"] for m in manifests] == pytest.approx([0.0, share], rel=1e-3)
    assert manifests[1]["export_changed"] == pytest.approx(changed.mean().item())


# The first step


@pytest.mark.parametrize("adapter", [[], ["--use_peft", "--lora_target_modules", "all-linear"]], ids=["whole", "adapter"])
def test_policy_and_reference_are_equal_at_the_first_step_in_two_processes_too(adapter, bf16_base, annotated, tmp_path):
    words = [
        "dpo_iteration/run_dpo.py", "configs/training.yaml", "--model_name_or_path", bf16_base, "--ref_model", bf16_base,
        "--dataset_name_or_path", annotated, "--output_dir", tmp_path / "policy", "--max_prompt_length", 64, "--max_steps", 1,
        "--beta", 1.0, "--per_device_train_batch_size", 4, *SMALL, *adapter,
    ]  # fmt: skip
    codes, errors = launch(2, tmp_path, *words)
    assert codes == [0, 0], errors[-3000:]
    assert first_loss(errors) == pytest.approx(math.log(2), abs=1e-3)
    weights = "dtype=float32 weights, frozen bfloat16 ones, bf16" if adapter else "dtype=float32 weights, bf16"
    assert weights in errors


@pytest.mark.parametrize(
    ("settings", "adapter", "wanted"),
    [
        ({"bf16": True}, False, "float32"),
        ({"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}, False, "float32"),
        ({"bf16": False, "model_init_kwargs": {"dtype": "auto"}}, False, "float32"),
        ({"bf16": True}, True, "bfloat16"),
        ({"bf16": False}, True, "float32"),
        ({"bf16": True, "model_init_kwargs": {"dtype": "float16"}}, True, "float16"),
    ],
)
@pytest.mark.parametrize("config_class", [SFTConfig, RewardConfig, DPOConfig, KTOConfig])
def test_what_is_trained_is_loaded_in_float32_and_what_is_frozen_as_asked(
    config_class, settings, adapter, wanted, tmp_path, caplog
):
    with caplog.at_level(logging.INFO, logger="baton"):
        config = trainer_config(config_class, {"use_cpu": True, **settings}, [], Stage(tmp_path / "out", {}), adapter)
    assert config.model_init_kwargs["dtype"] == wanted
    overruled = "model_init_kwargs" in settings and not adapter
    assert ("the weights are trained in float32 all the same" in caplog.text) == overruled


# A merged adapter


def test_a_merged_adapter_keeps_the_margin_and_says_what_a_16_bit_copy_would_lose(bf16_base, annotated, tmp_path):
    folder = tmp_path / "adapter"
    lora = ["--use_peft", "--lora_target_modules", "all-linear", "--learning_rate", 1e-4, "--max_steps", 6]
    bf16 = ["--model_init_kwargs", '{"dtype": "bfloat16"}']
    train("dpo_iteration/run_dpo.py", bf16_base, annotated, folder, "configs/training.yaml", *lora, *bf16)
    pairs = read_jsonl(f"{folder}.pairs.jsonl")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bf16_base, dtype=torch.float32), folder)
    start = AutoModelForCausalLM.from_pretrained(bf16_base, dtype=torch.float32)
    gain = margin(adapted, pairs, bf16_base) - margin(start, pairs, bf16_base)
    assert abs(gain) > 0.002

    config = SimpleNamespace(model_init_kwargs={"dtype": "bfloat16"})
    assert LoraArguments(use_peft=True, merge_adapter=True).export_dtype == "float32"
    lost = {}
    for dtype in ("float32", "checkpoint"):
        merged = tmp_path / dtype
        shutil.copytree(folder, merged)
        facts = merge_adapter(str(bf16_base), merged, config, dtype)
        assert not list(merged.glob("adapter_*")) and facts["export_lost_in_16_bits"] > 0.02
        lost[dtype] = abs(margin(merged, pairs) - margin(start, pairs, bf16_base) - gain)
    assert lost["float32"] < 1e-4 + 0.001 * abs(gain) and lost["checkpoint"] > 3 * lost["float32"]
