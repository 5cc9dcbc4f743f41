"""KTO: mismatched prompts in every batch, TRL's losses, and the program as users run it."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from baton.drops import Drops
from baton.errors import InputError
from baton.models import attention
from baton.models.attention import by_trees
from baton.models.templates import load_tokenizer
from baton.models.trees import Layout
from baton.training.adapters import LoraArguments, adapter_config
from baton.training.reference import reference_logps
from dpo_iteration.kto import PackedKTOTrainer, balance_advice, check_config, in_training_order, with_reference_logps
from dpo_iteration.rows import Rows
from tests.models.tiny_models import model_of, pairs_of, random_pairs
from tests.programs import read_jsonl, run_program

MAX_LENGTH = 16


def config_of(folder="unused", **values):
    fixed = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    return KTOConfig(**fixed | values)


def dataset_of(prompts):
    """One row for each of `prompts`, told apart by the first token of its completion."""
    return Dataset.from_list(
        [{"prompt_ids": [1] * p, "completion_ids": [100 + n] * 9, "label": n % 2 == 0} for n, p in enumerate(prompts)]
    )


def test_sampled_token_ids_are_learnt_as_they_are_and_an_end_only_where_the_policy_stopped(task):
    tokenizer = load_tokenizer(str(task / "base"))
    sampled = [id_ for letter in "Warm." for id_ in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    cut = {"completion": "Warm.", "completion_finish_reason": "length"}
    responses = [
        {"completion": "Warm.", "completion_token_ids": sampled},
        {"completion": "Warm."},
        cut,
        {**cut, "completion": ""},
        {"completion": "", "completion_token_ids": [tokenizer.eos_token_id]},
    ]
    prompt = [{"role": "user", "content": "Continue."}]
    examples = [(str(n), {"id": str(n), "prompt": prompt, "label": n == 0, **r}) for n, r in enumerate(responses)]
    drops, counted = Drops(), Counter()
    rows = list(Rows(tokenizer, 64, 32, drops, counted).of_examples(examples))
    assert [row["label"] for row in rows] == [True, False, False, False]
    as_sampled, stopped, cut_off, silent = (row["completion_ids"] for row in rows)
    assert as_sampled == sampled != cut_off and stopped == [*cut_off, tokenizer.eos_token_id] == [*cut_off, *silent]
    assert drops.names == {"a response without a token": ["3"]}
    assert list(Rows(tokenizer, 64, 2, drops, counted).of_examples(examples)) == []


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=20).filter(lambda p: len(set(p)) > 1), st.integers(2, 6), st.integers(0, 3)
)
def test_each_row_comes_once_with_a_response_to_another_prompt(prompts, batch, seed):
    config = config_of(per_device_train_batch_size=batch, seed=seed)
    rows = list(in_training_order(dataset_of(prompts), config, MAX_LENGTH))
    numbers = [row["completion_ids"][0] - 100 for row in rows]
    assert sorted(numbers) == list(range(len(prompts)))
    for place, row in enumerate(rows):
        other = row["KL_completion_ids"][0] - 100
        mates = numbers[place - place % batch :][:batch]
        assert prompts[other] != len(row["prompt_ids"])
        assert other in mates or len({prompts[mate] for mate in mates}) == 1
        assert len(row["prompt_ids"]) + len(row["KL_completion_ids"]) == min(MAX_LENGTH, len(row["prompt_ids"]) + 9)


def test_the_order_is_random_by_the_seed_and_one_prompt_alone_is_refused():
    def order(rows, seed):
        return [row["completion_ids"][0] for row in in_training_order(rows, config_of(seed=seed), MAX_LENGTH)]

    many = dataset_of([number % 5 + 1 for number in range(40)])
    assert order(many, 1) == order(many, 1) != order(many, 2) != sorted(order(many, 2))
    with pytest.raises(InputError, match="all examples have the same prompt"):
        order(dataset_of([3, 3, 3]), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_device_train_batch_size": 1}, "`per_device_train_batch_size` must be at least 2"),
        ({"train_sampling_strategy": "random"}, "`train_sampling_strategy` must be sequential"),
        ({"loss_type": "bco"}, "'bco' is not one of kto, apo_zero_unpaired"),
        ({"sync_ref_model": True}, "`sync_ref_model`"),
        ({"desirable_weight": 0.0}, "`desirable_weight` must be above 0"),
        ({"undesirable_weight": float("nan")}, "`undesirable_weight` must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_model_loads(values, message):
    with pytest.raises(InputError, match=message):
        check_config(config_of(**values))
    check_config(config_of(loss_type="apo_zero_unpaired", per_device_train_batch_size=1, train_sampling_strategy="random"))
    check_config(config_of())


def test_advice_on_weights_comes_only_where_they_are_out_of_balance_and_following_it_ends_it():
    assert balance_advice(120, 100, config_of()) is None
    assert "100 desirable examples of weight 1 to 300" in balance_advice(100, 300, config_of())
    assert "set desirable_weight from 3.00 to 4.00, or undesirable_weight from 0.25 to 0.33" in balance_advice(
        100, 300, config_of()
    )
    for weights in (
        {"desirable_weight": 3.0},
        {"desirable_weight": 4.0},
        {"undesirable_weight": 0.25},
        {"undesirable_weight": 0.33},
    ):
        assert balance_advice(100, 300, config_of(**weights)) is None
    assert "set desirable_weight from 0.50 to 0.67" in balance_advice(200, 100, config_of())


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_loss_gradients_and_metrics_are_those_of_trl(task, tmp_path, loss_type):
    texts = [
        ("It opens at sea.", " A warm film."),
        ("A train leaves.", " A dull mess of a plot."),
        ("Night falls.", " It shines."),
    ]
    rows = [{"prompt": p, "completion": c, "label": n != 1} for n, (p, c) in enumerate(texts)]
    tokenizer = load_tokenizer(str(task / "base"))

    def model(noise):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_pretrained(task / "base", dtype=torch.float32)
        for parameter in made.parameters():
            parameter.data += noise * torch.randn_like(parameter)
        return made

    values = {
        "per_device_train_batch_size": 3,
        "gradient_checkpointing": False,
        "loss_type": loss_type,
        "undesirable_weight": 1.5,
    }
    config = config_of(tmp_path, **values)
    theirs = KTOTrainer(
        model(0.02), ref_model=model(0), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    prepared = theirs.train_dataset.remove_columns(["prompt", "completion"])
    our_config = config_of(tmp_path, **values, precompute_ref_log_probs=True)
    ours = PackedKTOTrainer(
        model(0.02),
        args=our_config,
        train_dataset=with_reference_logps(prepared, str(task / "base"), our_config, tmp_path),
        processing_class=tokenizer,
    )
    outcomes = []
    for trainer in (theirs, ours):
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        outcomes.append((loss.item(), gradients, metrics))
    (loss, gradients, metrics), (our_loss, our_gradients, our_metrics) = outcomes
    assert our_loss == pytest.approx(loss, rel=1e-4)
    assert gradients.norm() > 0 and (our_gradients - gradients).norm() <= 1e-4 * gradients.norm()
    assert our_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5) and "rewards/margins" in metrics


def test_a_training_stops_at_a_first_batch_whose_packed_numbers_are_not_the_models_own(task, tmp_path, monkeypatch):
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"], "label": number % 2 == 0, "ref_logps": -9.0}
        for number, pair in enumerate(random_pairs(8))
    ]
    config = config_of(tmp_path, loss_type="apo_zero_unpaired", precompute_ref_log_probs=True, max_steps=1)

    def train():
        settings = {"train_dataset": Dataset.from_list(rows), "processing_class": load_tokenizer(str(task / "base"))}
        PackedKTOTrainer(model_of("llama"), args=config, check_first_batch=True, **settings).train()

    train()
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:]))
    with pytest.raises(InputError, match=r"rounding in float32 explains .* KTO has no other forward pass"):
        train()


def test_an_adapter_without_effect_gives_the_loss_of_the_whole_model_and_the_model_is_its_reference(task, tmp_path):
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair["chosen_ids"], "label": number % 2 == 0}
        for number, pair in enumerate(random_pairs(6))
    ]
    values = {"per_device_train_batch_size": 6, "gradient_checkpointing": False, "precompute_ref_log_probs": True}
    config = config_of(tmp_path, **values, model_init_kwargs={"dtype": "float32"})
    made = Dataset.from_list(list(in_training_order(Dataset.from_list(rows), config, 64)))
    made = with_reference_logps(made, str(task / "base"), config, tmp_path)
    found = []
    for adapter in (None, adapter_config(LoraArguments(use_peft=True, lora_target_modules="all-linear"))):
        trainer = PackedKTOTrainer(
            str(task / "base"), args=config, train_dataset=made, peft_config=adapter,
            processing_class=load_tokenizer(str(task / "base")),
        )  # fmt: skip
        assert trainer.ref_model is None
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
        loss.backward()
        found.append((loss.item(), trainer._metrics["train"]["kl"][-1]))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    # 1 - sigmoid(beta (0 - 0)) of a desirable and of an undesirable example
    assert found[1] == pytest.approx((0.5, 0.0), abs=1e-4)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)


def kto(task, data, output, *more):
    return run_program(
        "dpo_iteration/run_kto.py", "--model_name_or_path", task / "base", "--dataset_name_or_path", data,
        "--output_dir", output, "--max_length", 128, "--max_prompt_length", 64, "--use_cpu", "true", "--bf16", "false",
        "--gradient_checkpointing", "false", "--per_device_train_batch_size", 8, "--learning_rate", 1e-3,
        "--logging_steps", 1, *more,
    )  # fmt: skip


def test_the_examples_cannot_replace_an_input(task, annotated, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(annotated.read_bytes())
    refused = kto(task, data, tmp_path / "policy", "--examples_path", tmp_path / "." / "data.jsonl")
    assert refused.returncode == 2, refused.stderr
    assert f"{data}: cannot replace the input `data`; give another --examples_path" in refused.stderr
    assert data.read_bytes() == annotated.read_bytes()


def test_kto_raises_the_desirable_and_accounts_for_every_response(task, annotated, tmp_path):
    words = ["--desirable_above", 1.02, "--undesirable_below", 0.06]
    done = kto(task, annotated, tmp_path / "policy", *words)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if " rewards/margins " in line]
    losses = [float(line.split(" loss ")[1].split(",")[0]) for line in lines]
    margins = [float(line.split(" rewards/margins ")[1].split(",")[0]) for line in lines]
    assert all(map(math.isfinite, losses)) and losses[0] == pytest.approx(0.5, abs=0.05)  # the reference is the policy
    assert np.mean(margins[-5:]) > 0.1 > abs(margins[0]) - 0.1

    examples = read_jsonl(tmp_path / "policy.examples.jsonl")
    assert all(e["completion_reward"] > 1.02 if e["label"] else e["completion_reward"] < 0.06 for e in examples)
    manifest = json.loads((tmp_path / "policy.manifest.json").read_text())
    (dropped,) = manifest["counts"]["dropped"].values()
    assert manifest["counts"]["in"] == 4 * 48 == manifest["counts"]["out"] + dropped and dropped > 0
    counts = manifest["examples"]
    assert counts["desirable"] == sum(example["label"] for example in examples)
    assert counts["desirable"] + counts["undesirable"] == manifest["counts"]["out"] == len(examples)
    assert f"{counts['desirable']} desirable examples of weight 1 to {counts['undesirable']} undesirable" in done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (task / "base", tmp_path / "policy"))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in after)
    assert not list(tmp_path.glob("*.partial*"))

    again = kto(task, annotated, tmp_path / "policy", *words)
    assert again.returncode == 0 and "up to date" in again.stderr
    other = kto(task, annotated, tmp_path / "other", "--desirable_above", -9, "--undesirable_below", -9)
    assert other.returncode == 2 and "192 desirable and 0 undesirable examples are left" in other.stderr


def test_an_adapter_is_merged_and_the_best_checkpoint_is_exported_and_kept_with_the_last(task, annotated, tmp_path):
    lines = annotated.read_text().splitlines(keepends=True)
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    data.write_text("".join(lines[8:]))
    held_out.write_text("".join(lines[:8]))
    words = ["--use_peft", "--lora_r", 4, "--lora_target_modules", "all-linear", "--max_steps", 6, "--learning_rate", 1e-2]
    words += ["--eval_dataset_name_or_path", held_out, "--load_best_model_at_end", "true", "--early_stopping", 6]
    words += [word for name in ("eval", "save") for word in (f"--{name}_strategy", "steps", f"--{name}_steps", 2)]
    done = kto(task, data, tmp_path / "policy", *words, "--merge_adapter", "--keep_checkpoints", 2)
    assert done.returncode == 0, done.stderr
    evaluated = {
        line["step"]: line["eval_loss"] for line in read_jsonl(tmp_path / "policy.metrics.jsonl") if "eval_loss" in line
    }
    assert list(evaluated) == [2, 4, 6]
    best = min(evaluated, key=evaluated.get)
    manifest = json.loads((tmp_path / "policy.manifest.json").read_text())
    assert manifest["metrics"]["eval_loss"] == evaluated[best]
    kept = {path.name for path in (tmp_path / "policy").glob("step-*")}
    assert len(kept) == 2 and f"step-{best}" in kept
    pairs = pairs_of(random_pairs(6))
    policy, of_best = (
        reference_logps(AutoModelForCausalLM.from_pretrained(tmp_path / "policy" / name), pairs)
        for name in (".", f"step-{best}")
    )
    torch.testing.assert_close(policy, of_best)
    assert json.loads((tmp_path / "policy" / f"step-{best}/generation_config.json").read_text())["eos_token_id"]

    adapter = kto(task, data, tmp_path / "adapter", *words)
    assert adapter.returncode == 0, adapter.stderr
    base = AutoModelForCausalLM.from_pretrained(task / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").get_base_model()
    torch.testing.assert_close(policy, reference_logps(adapted, pairs), atol=1e-4, rtol=1e-4)
