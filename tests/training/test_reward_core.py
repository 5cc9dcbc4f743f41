"""Reward models on packed rows give TRL's numbers: losses, gradients, steps, an evaluation; and how good rewards are."""

import copy
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, BloomConfig
from trl import RewardConfig, RewardTrainer

from baton.errors import InputError
from baton.models import attention
from baton.models.attention import by_trees
from baton.models.trees import Layout
from reward_model.quality import accuracy, by_margin, calibration_error, quality, wilson_interval
from reward_model.trainer import PackedRewardTrainer
from tests.models.tiny_models import FAMILIES, SHAPE, VOCABULARY, one_thread, random_pairs
from tests.programs import read_jsonl, run_program, write_jsonl
from tests.training.test_dpo_core import tokenizer
from tests.training.test_training_programs import SHORT

__all__ = ["one_thread", "tokenizer"]  # fixtures


def model_of(family):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


def rows_of(margin=False):
    """Whole conversations; of one pair the rejected is the chosen's beginning, one shares nothing, one ends with padding."""
    pairs = random_pairs(9)
    rows = [{side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} for row in pairs]
    rows[3]["rejected_ids"] = rows[3]["chosen_ids"][:-1]
    rows[4]["rejected_ids"] = [60, *rows[4]["rejected_ids"][1:]]
    rows[5]["chosen_ids"] = [*rows[5]["chosen_ids"][:-2], 0, 0]
    if margin:
        rows = [row | {"margin": pair["margin"]} for row, pair in zip(rows, pairs, strict=True)]
    return Dataset.from_list(rows)


def trainer_of(model, rows, tokenizer, folder="unused", trl=False, more=(), **config):
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
    fixed |= {"save_strategy": "no", "logging_steps": 1, "max_length": None, "per_device_train_batch_size": 9}
    made = RewardTrainer if trl else PackedRewardTrainer
    args = RewardConfig(str(folder), **fixed | config)
    return made(copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer, **dict(more))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize(("margin", "center"), [(False, None), (True, 0.1)])
def test_loss_gradients_and_metrics_are_those_of_trl(family, margin, center, tokenizer):
    rows = rows_of(margin)
    ours, trls = (
        trainer_of(model_of(family), rows, tokenizer, trl=trl, center_rewards_coefficient=center) for trl in (False, True)
    )
    every = list(rows)
    wanted = trls.compute_loss(trls.model.train(), trls.data_collator(every))
    found, metrics = ours.measure(ours.model.train(), ours.data_collator(every))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    for name, value in metrics.items():
        assert value == pytest.approx(trls._metrics["train"][name][-1], rel=1e-4, abs=1e-6), name
    wanted.backward()
    found.backward()
    for (name, packed), (_, padded) in zip(ours.model.named_parameters(), trls.model.named_parameters(), strict=True):
        assert (packed.grad - padded.grad).norm() <= 1e-4 * padded.grad.norm() + 1e-7, name
    assert ours.model.score.weight.grad.norm() > 0


METRICS = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens")


def test_training_steps_and_evaluations_are_those_of_trl_in_rows_of_any_size(tokenizer, tmp_path):
    rows, runs = rows_of(margin=True), []
    config = {"max_steps": 3, "learning_rate": 1e-3, "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 3}
    for trl, tokens in ((True, None), (False, 10_000), (False, 40)):
        more = {} if trl else {"tokens_per_row": tokens, "check_first_batch": True}
        more["eval_dataset"] = rows.select(range(7))
        trainer = trainer_of(model_of("llama"), rows, tokenizer, tmp_path, trl, more, **config)
        trainer.train()
        history = trainer.state.log_history
        runs.append([[line[name] for name in METRICS] for line in history if "loss" in line])
        (evaluated,) = (line for line in history if "eval_loss" in line)
        runs[-1].append([evaluated[f"eval_{name}"] for name in METRICS if name not in ("grad_norm", "num_tokens")])
    assert len(runs[0]) == 4
    for run in runs[1:]:
        for first, second in zip(runs[0], run, strict=True):
            assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    assert trainer.rewards.shape == (7, 2)


def test_what_packed_rows_do_not_suit_is_trained_as_trl_does(tokenizer, tmp_path, caplog):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, num_labels=1)
    model, rows, losses = AutoModelForSequenceClassification.from_config(config), rows_of(), []
    for trl in (True, False):
        more = {} if trl else {"eval_dataset": rows}
        trainer = trainer_of(model, rows, tokenizer, tmp_path, trl, more, max_steps=2, per_device_eval_batch_size=4)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and "padded" in caplog.text
    trainer.evaluate()
    batch = trainer.data_collator(list(rows))
    expected = trainer.model(**batch).logits[:, 0].view(2, -1).T
    assert trainer.rewards == pytest.approx(expected.detach().numpy(), abs=1e-5)


def test_packed_numbers_that_are_not_the_models_own_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "by_trees", lambda *a: by_trees(*a[:3], Layout([(a[3].length, [])]), *a[4:]))
    trainer = trainer_of(model_of("llama"), rows_of(), tokenizer, tmp_path, more={"check_first_batch": True}, max_steps=1)
    with pytest.raises(InputError, match="hidden states differ"):
        trainer.train()


def test_a_normal_head_has_the_deviation_that_its_width_says(tokenizer):
    heads = [
        trainer_of(model_of("llama"), rows_of(), tokenizer, more={"head_init": "normal"}, seed=seed).model.score.weight
        for seed in (1, 1, 2)
    ]
    assert (heads[0] == heads[1]).all() and (heads[0] != heads[2]).all()
    assert heads[0].std().item() == pytest.approx(1 / math.sqrt(SHAPE["hidden_size"] + 1), rel=0.4)


# Quality


def test_an_adapter_over_bfloat16_weights_trains_in_float32(tokenizer, tmp_path):
    more = {"peft_config": LoraConfig(task_type="SEQ_CLS", r=4)}
    model = model_of("llama").to(torch.bfloat16)
    trainer = trainer_of(model, rows_of(), tokenizer, tmp_path, more=more, bf16=True, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained) and {weight.dtype for weight in trained.values()} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def test_an_interval_is_the_textbooks():
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Newcombe, 1998
    assert wilson_interval(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.data())
def test_an_interval_holds_the_share_and_stays_in_range(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert low < high


def test_probabilities_that_are_as_often_right_as_they_say_are_calibrated():
    differences = np.random.default_rng(0).normal(size=200_000)
    flipped = np.where(np.random.default_rng(1).random(200_000) < 1 / (1 + np.exp(-np.abs(differences))), 1, -1)
    assert calibration_error(np.abs(differences) * flipped) < 0.01
    assert calibration_error(np.full(100, 20.0)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(np.full(100, -20.0)) == pytest.approx(1, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 3.0, np.nan]), min_size=1, max_size=40), st.randoms())
def test_every_pair_with_a_margin_is_in_one_bucket_and_buckets_rise(margins, rng):
    right = np.array([rng.random() < 0.7 for _ in margins])
    buckets = by_margin(right, np.array(margins))
    known = np.isfinite(margins)
    assert sum(bucket["pairs"] for bucket in buckets) == known.sum() and len(buckets) <= 4
    assert sum(bucket["pairs"] * bucket["accuracy"] for bucket in buckets) == pytest.approx(right[known].sum())
    for first, second in pairwise(buckets):
        assert first["from"] <= first["to"] < second["from"]


def test_quality_is_that_of_its_parts():
    rewards = np.array([[1.0, 0.0], [2.0, 3.0], [0.5, 0.5], [4.0, 1.0]])
    found = quality(rewards, np.array([1.0, np.nan, 1.0, 2.0]))
    assert found["accuracy"] == 0.5 and found["mean_chosen_reward"] == 1.875 and found["mean_rejected_reward"] == 1.125
    assert [bucket["pairs"] for bucket in found["by_margin"]] == [2, 1]
    assert found["accuracy_interval"] == accuracy(rewards[:, 0] > rewards[:, 1])["accuracy_interval"]


# The program


def test_an_adapter_is_merged_into_a_reward_model_and_margins_are_in_the_loss_and_the_manifest(task, tmp_path):
    pairs = [pair | {"margin": 0.5 + number % 4} for number, pair in enumerate(read_jsonl(task / "data/rm_train.jsonl"))]
    words = [
        "reward_model/run_rm.py", "--model_name_or_path", task / "base", "--dataset_name_or_path",
        write_jsonl(tmp_path / "pairs.jsonl", pairs), "--output_dir", tmp_path / "rm", "--margin_scale", 1,
        "--head_init", "normal", "--loss", "log_exp", "--use_peft", "--merge_adapter", "--learning_rate", 1e-2,
        "--max_steps", 3, *SHORT,
    ]  # fmt: skip
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    held_out = json.loads((tmp_path / "rm.manifest.json").read_text())["held_out"]
    low, high = held_out["accuracy_interval"]
    assert low < held_out["accuracy"] < high and 0 <= held_out["calibration_error"] <= 1
    assert sum(bucket["pairs"] for bucket in held_out["by_margin"]) == held_out["pairs"] == 10
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert model.config.num_labels == 1 and model.config.pad_token_id is not None
    assert not list((tmp_path / "rm").glob("adapter*"))
    scored = []
    from baton.models.templates import conversation_token_ids, load_tokenizer

    tokenizer = load_tokenizer(str(task / "base"))
    for pair in pairs[19::20]:
        for side in ("chosen", "rejected"):
            messages = [*as_prompt(pair["prompt"]), {"role": "assistant", "content": pair[side]}]
            ids = torch.tensor([conversation_token_ids(tokenizer, messages, "here")])
            with torch.no_grad():
                scored.append(model(ids).logits.item())
    assert np.mean(scored[::2]) == pytest.approx(held_out["mean_chosen_reward"], abs=1e-3)

    without = write_jsonl(tmp_path / "pairs.jsonl", [{k: v for k, v in pair.items() if k != "margin"} for pair in pairs])
    words[words.index(tmp_path / "rm")] = tmp_path / "other"
    refused = run_program(*words[:4], without, *words[5:])
    assert refused.returncode == 2 and "`margin_scale` needs the margin of every pair, but 190 pairs" in refused.stderr


def as_prompt(prompt):
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
