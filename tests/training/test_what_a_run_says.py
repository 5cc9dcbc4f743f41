"""What a DPO run refuses and estimates before it loads a model, and what it says while it trains."""

import copy
import logging
import math
import re

import pytest
import torch
import yaml
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, TrainerState
from trl import DPOConfig

from baton.errors import InputError
from baton.models.trees import distinct_tokens
from baton.training.adapters import LoraArguments, adapter_config
from baton.training.checks import check_precision
from baton.training.memory import (
    Sharding,
    check_memory,
    count_weights,
    estimate,
    gib,
    largest_batch,
    outline,
    sharding_of,
    with_critic,
)
from baton.training.metrics import WarnOfTrouble, forward_flops, peak_flops_of, weights_of
from baton.training.progress import ProgressLines
from baton.training.reference import reference_logps
from dpo_iteration import run_kto
from dpo_iteration.checks import check_count, check_training
from dpo_iteration.kto import check_memory_of
from dpo_iteration.run_dpo import Arguments
from tests.programs import ROOT
from tests.training.test_dpo_core import model_of, pairs_of, random_pairs, tokenizer, trainer_of, with_reference

__all__ = ["tokenizer"]  # a fixture


def config_of(folder="unused", **settings):
    return DPOConfig(str(folder), **{"use_cpu": True, "bf16": False, "report_to": "none", **settings})


def arguments_of(**settings):
    return Arguments(model_name_or_path="m", dataset_name_or_path="d", output_dir="o", **settings)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "config", "sharding", "message"),
    [
        ({}, {"loss_type": ["exo_pair"]}, {}, "exo_pair needs `label_smoothing`"),
        ({}, {"max_steps": 0}, {}, "`max_steps`: 0 would train by epochs"),
        ({}, {"num_train_epochs": 0}, {}, "`num_train_epochs` must be above 0"),
        ({}, {"per_device_train_batch_size": 0}, {}, "`per_device_train_batch_size` must be 1 or more"),
        ({}, {"save_only_model": True}, {}, "`save_only_model` leaves the optimizer out"),
        ({}, {"neftune_noise_alpha": 5.0}, {}, "`neftune_noise_alpha` would take a packed row for one text"),
        ({}, {"sync_ref_model": True}, {}, "`sync_ref_model` changes the reference"),
        ({"use_peft": True, "forward": "trl"}, {"sync_ref_model": True}, {}, "`sync_ref_model` does not go with `use_peft`"),
        ({"use_peft": True, "lora_dropout": 0.1}, {}, {}, "`lora_dropout` does nothing with `disable_dropout`"),
        ({"use_peft": True, "load_in_4bit": True}, {}, {"stage": 3}, "`load_in_4bit` does not go with ZeRO-3"),
        ({}, {"fp16": True}, {}, "`fp16` needs a GPU"),
    ],
)
def test_a_combination_that_cannot_train_is_refused(arguments, config, sharding, message):
    with pytest.raises(InputError, match=message):
        check_training(arguments_of(**arguments), config_of(**config), Sharding(**sharding))


def test_what_can_train_is_not_refused():
    check_training(arguments_of(), config_of(), Sharding())
    check_training(arguments_of(use_peft=True, load_in_4bit=True), config_of(loss_type=["sigmoid", "sft"]), Sharding(stage=2))


def test_bf16_is_refused_where_the_gpu_only_imitates_it():
    check_precision(config_of(bf16=True), (8, 0))
    check_precision(config_of(bf16=True), None)
    with pytest.raises(InputError, match=r"compute capability 7\.5.*set `fp16: true`"):
        check_precision(config_of(bf16=True), (7, 5))


@pytest.mark.parametrize("launched", ["bf16", "fp16", "fp8"])
def test_a_precision_that_the_launcher_alone_sets_is_refused(launched, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(InputError, match=f"`mixed_precision: {launched}` would train in it in spite of `bf16: false`"):
        check_training(arguments_of(), config_of(), Sharding())
    check_training(arguments_of(), config_of(bf16=True), Sharding())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_training(arguments_of(), config_of(bf16=True), Sharding())
    check_training(arguments_of(), config_of(), Sharding())


def test_fewer_pairs_than_a_batch_are_refused_where_they_would_be_repeated_or_dropped():
    check_count(3, config_of(per_device_train_batch_size=4), dealt=True)
    dropped = config_of(per_device_train_batch_size=2, gradient_accumulation_steps=2, dataloader_drop_last=True)
    with pytest.raises(InputError, match=r"3 pairs are fewer than one batch: 1 processes x .* x `gradient_accumulation_steps`"):
        check_count(3, dropped, dealt=True)
    check_count(3, dropped, dealt=False)


def test_data_and_shards_are_divided_among_data_parallel_ranks_not_processes(monkeypatch):
    config = config_of(per_device_train_batch_size=1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    assert sharding_of(config).processes == 4
    check_count(4, config, dealt=False)
    check_count(3, config, dealt=True)
    with pytest.raises(InputError, match="3 pairs are fewer than one batch: 4 processes"):
        check_count(3, config, dealt=False)


# Memory


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_weights_gradients_and_optimizer_states_are_estimated_exactly(family, lora, tokenizer, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path / "model")
    rows = with_reference(random_pairs(4), model)
    trainer = trainer_of(model, rows, tokenizer, tmp_path, lora=lora, max_steps=1)
    adapter = trainer.model.peft_config["default"] if lora else None
    needs = estimate(outline(str(tmp_path / "model"), adapter), trainer.args, sharding_of(trainer.args), tokens=100)
    trainer.train()

    states = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert needs["weights"] == sum(p.nbytes for p in trainer.model.parameters())
    assert needs["gradients"] == sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert needs["optimizer states"] == sum(state.nbytes for state in states)
    assert needs["activations"] > 0 == needs["offloaded"]


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("8b")
    LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.mark.parametrize(
    ("config", "sharding", "wanted"),  # GB of weights, gradients, optimizer states of 8.03 billion weights
    [
        ({}, {}, (32.1, 32.1, 64.2)),
        ({"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True}, {}, (32.1, 32.1, 64.2)),
        ({"optim": "adamw_bnb_8bit"}, {}, (32.1, 32.1, 16.1)),
        ({"bf16": True}, {"processes": 8, "stage": 2, "deepspeed": True}, (16.1, 2.0, 12.0)),
        ({"bf16": True}, {"processes": 8, "stage": 3, "deepspeed": True}, (2.0, 2.0, 12.0)),
        ({"bf16": True}, {"processes": 8, "stage": 3}, (4.0, 4.0, 8.0)),
    ],
)
def test_an_8b_model_is_estimated_as_it_is_spread(config, sharding, wanted, llama_8b):
    needs = estimate(outline(llama_8b), config_of(**config), Sharding(**sharding), tokens=4096)
    assert [needs[name] / 1e9 for name in ("weights", "gradients", "optimizer states")] == pytest.approx(wanted, abs=0.06)


def test_the_copies_that_autocast_makes_of_trained_weights_are_counted(llama_8b):
    needs = estimate(outline(llama_8b), config_of(bf16=True), Sharding(), tokens=4096)
    assert needs["copies that autocast makes"] / 1e9 == pytest.approx(16.1, abs=0.06)
    frozen = estimate(outline(llama_8b, adapter_config(LoraArguments(use_peft=True))), config_of(bf16=True), Sharding(), 4096)
    assert frozen["copies that autocast makes"] < 0.1e9


def test_offloading_and_4_bits_take_memory_off_the_device(llama_8b):
    offload = Sharding(8, 3, True, offload_optimizer=True, offload_weights=True)
    needs = estimate(outline(llama_8b), config_of(bf16=True), offload, tokens=4096)
    assert needs.keys() == {"gradients", "activations", "offloaded"}
    assert needs["offloaded"] / 1e9 == pytest.approx(14.1, abs=0.1)
    both = with_critic(needs, needs)
    assert both["offloaded"] == 2 * needs["offloaded"] and both["critic"] == needs["gradients"] + needs["activations"]
    adapter = adapter_config(LoraArguments(use_peft=True))
    config = config_of(bf16=True, model_init_kwargs={"dtype": "bfloat16"})
    needs = estimate(outline(llama_8b, adapter), config, Sharding(), tokens=4096, in_4_bit=True)
    assert needs["weights"] / 1e9 == pytest.approx(6.0, abs=0.1) and needs["gradients"] < 0.1e9


def test_a_reward_model_has_outputs_in_place_of_a_vocabulary(llama_8b):
    of_policy, of_rewards = (estimate(outline(llama_8b, None, n), config_of(), Sharding(), 4096) for n in (None, 5))
    assert (of_policy["weights"] - of_rewards["weights"]) / 4 == (128256 - 5) * 4096
    adapter = adapter_config(LoraArguments(use_peft=True), "SEQ_CLS")
    config = config_of(bf16=True, model_init_kwargs={"dtype": "bfloat16"})
    needs = estimate(outline(llama_8b, adapter, 1), config, Sharding(), 4096, in_4_bit=True)
    assert needs["weights"] / 1e9 == pytest.approx(6.0 - 1.05, abs=0.1)  # without the head's 0.53 billion in bfloat16


def test_the_layout_that_ppo_yaml_names_fits_on_gpus_of_80_gb(llama_8b):
    """With a tenth to spare for what no estimate counts."""
    text = (ROOT / "configs/ppo.yaml").read_text()
    servers, launcher = re.search(r"SERVER_GPUS=(\d) ACCELERATE_CONFIG=(\S+) ", text).groups()
    stage = yaml.safe_load((ROOT / launcher).read_text())["deepspeed_config"]["zero_stage"]
    settings = yaml.safe_load(text)
    assert settings["num_servers"] == int(servers)
    sharding, config = Sharding(8 - int(servers), stage, deepspeed=True), config_of(bf16=True)
    actor = estimate(outline(llama_8b), config, sharding, settings["tokens_per_row"], reference=True)
    critic = estimate(outline(llama_8b, None, 1), config, sharding, tokens=1)
    reward_server = 2 * count_weights(outline(llama_8b, None, 1), trained=True)
    assert sum(with_critic(actor, critic).values()) + reward_server < 0.9 * 80e9


def test_the_largest_batch_is_that_of_the_longest_pair():
    rows = Dataset.from_list([{"prompt_ids": [1] * p, "chosen_ids": [1] * 4, "rejected_ids": [1] * 5} for p in (3, 10, 7)])
    config = config_of(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert largest_batch(rows, config, packed=True) == 2 * 19
    assert largest_batch(rows, config, packed=False) == 2 * 29
    assert [largest_batch(rows, config, True, tokens_per_row) for tokens_per_row in (10, 50, 4096)] == [19, 50, 4 * 19]
    assert [largest_batch(rows, config, packed, sides=("rejected",)) for packed in (True, False)] == [2 * 15] * 2


def test_kto_says_what_memory_its_batch_takes_and_refuses_what_cannot_be_made_before_it_loads(llama_8b, caplog):
    rows = Dataset.from_list([{"prompt_ids": [1] * p, "completion_ids": [1] * 96} for p in (160, 32)])
    given = {"model_name_or_path": str(llama_8b), "dataset_name_or_path": "d", "output_dir": "o"}
    with caplog.at_level(logging.INFO, logger="baton"):
        check_memory_of(run_kto.Arguments(**given), config_of(per_device_train_batch_size=4), rows)
    said = next(record.message for record in caplog.records if record.levelname == "INFO")
    tokens = 4 * 256
    wanted = estimate(outline(llama_8b), config_of(), Sharding(), tokens)
    assert f"{gib(wanted['activations'])} activations, or before that for the reference: 29.9 GiB weights" in said
    with pytest.raises(InputError, match="`lora_target_modules`"):
        check_memory_of(run_kto.Arguments(**given, use_peft=True, lora_target_modules=["none"]), config_of(), rows)
    with pytest.raises(InputError, match="3 examples are fewer than one batch"):
        check_count(3, config_of(per_device_train_batch_size=4, dataloader_drop_last=True), dealt=False, what="examples")


def test_a_warning_says_what_takes_less_where_memory_does_not_suffice(caplog):
    with caplog.at_level(logging.INFO, logger="baton"):
        check_memory({"weights": 2.0**20, "offloaded": 0.0}, config_of())
        assert [record.levelname for record in caplog.records] == ["INFO"]
        check_memory({"weights": 2.0**60, "offloaded": 0.0}, config_of())
    assert caplog.records[-1].levelname == "WARNING" and "a smaller per_device_train_batch_size" in caplog.text


# Metrics


def train(tokenizer, folder, rows=None, **settings):
    """Train a tiny model with a line of the log a step; its trainer."""
    model = model_of("llama")
    rows = rows or with_reference(random_pairs(8), model)
    trainer = trainer_of(model, rows, tokenizer, folder, logging_steps=1, **{"max_steps": 2, **settings})
    trainer.train()
    return trainer


def test_kl_lengths_and_useful_tokens_are_what_they_say(tokenizer, tmp_path):
    model = model_of("llama")
    rows = with_reference(random_pairs(8), model)
    sequences = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    longest = max(len(prompt) + len(response) for prompt, response in sequences)
    reference = torch.tensor([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows])
    kl = (reference_logps(model, pairs_of(rows)) - reference).mean().item()
    useful = {"one row": 1.0, "padded": distinct_tokens(sequences) / (len(sequences) * longest)}
    for name, how in (("one row", {"tokens_per_row": None}), ("padded", {"packed": False})):
        trainer = train(tokenizer, tmp_path, rows, per_device_train_batch_size=8, **how)
        first = trainer.state.log_history[0]
        assert first["kl_on_pairs"] == pytest.approx(kl, rel=1e-3)
        assert first["lengths/chosen"] == sum(len(row["chosen_ids"]) for row in rows) / 8
        assert first["lengths/rejected"] == sum(len(row["rejected_ids"]) for row in rows) / 8
        assert first["useful_tokens"] == pytest.approx(useful[name])
        assert first["tokens_per_second"] > 0 and "mfu" not in first


def test_a_pair_longer_than_a_row_is_computed_whole_with_its_prompt_once(tokenizer, tmp_path):
    row = {"prompt_ids": [5] * 20, "chosen_ids": [6] * 11, "rejected_ids": [7] * 11, "margin": 1.0}
    rows = with_reference([row, row], model_of("llama"))
    first = train(tokenizer, tmp_path, rows, per_device_train_batch_size=2, tokens_per_row=30).state.log_history[0]
    assert first["useful_tokens"] == 1


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2"])
def test_flops_of_the_forward_pass_are_those_of_its_matrix_products(family):
    model = model_of(family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 60, (1, 40)))
    products = sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(operator))
    attention = counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)
    # Norms and biases, which are no products, are a hundredth of so small a model
    assert forward_flops(weights_of(model), 40, 40) == pytest.approx(products - attention, rel=0.02)


def test_a_gpu_is_known_by_its_whole_name_and_others_have_no_mfu():
    names = ["NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA H20"]
    assert [peak_flops_of(name) for name in names] == [989e12, 756e12, 312e12, 181e12, None, 148e12]


def warnings_of(caplog, lines, beta=0.1, starts_at_ln_2=True, **settings):
    """What WarnOfTrouble says to lines of a log, given as (step, metrics)."""
    callback, config = WarnOfTrouble(beta, starts_at_ln_2), config_of(**settings)
    state = TrainerState(max_steps=100)
    caplog.clear()
    for step, line in lines:
        logs = {"rewards/chosen": 0.0, "rewards/margins": 0.1, "rewards/accuracies": 0.5, "lengths/chosen": 100.0, **line}
        state.global_step = step
        state.log_history.append({**logs, "step": step})
        callback.on_log(config, state, None, logs=logs)
    return caplog.messages


def test_falling_chosen_responses_are_said_once_with_the_fall_in_nats(caplog):
    falls = [(step, {"loss": 0.4, "rewards/chosen": 0.3 - step / 100}) for step in range(10, 200, 10)]
    (message,) = warnings_of(caplog, falls)
    assert message.startswith("step 110:") and "fallen by 10.0 nats since the first line (0.10 a token)" in message
    assert warnings_of(caplog, falls[:9]) == []


@pytest.mark.parametrize(("steps", "said"), [(10, True), (11, False)])
def test_a_training_that_ends_within_its_warm_up_is_warned_of(steps, said, caplog):
    config, state = config_of(warmup_steps=10, learning_rate=1e-6), TrainerState(max_steps=steps)
    ProgressLines().on_train_begin(config, state, None)
    assert ("the learning rate never reaches 1e-06" in caplog.text) == said


def test_a_loss_that_stays_at_ln_2_past_the_warm_up_is_said_once(caplog):
    still = [(step, {"loss": math.log(2) + 0.001}) for step in range(5, 100, 5)]
    (message,) = warnings_of(caplog, still, warmup_steps=20)
    assert message.startswith("step 35:") and "chat template" in message  # 31 to 35: a tenth of 100 steps past the 20
    learns = [(step, {"loss": math.log(2) - step / 1000}) for step in range(5, 100, 5)]
    assert warnings_of(caplog, learns, warmup_steps=20) == []
    assert warnings_of(caplog, still, warmup_steps=20, starts_at_ln_2=False) == []


@pytest.mark.parametrize(("dtype", "named"), [(torch.bfloat16, True), (torch.float32, False)])
def test_weights_that_a_step_cannot_move_are_named_beside_a_loss_that_stays_at_ln_2(dtype, named, tokenizer, tmp_path, caplog):
    model = model_of("llama").to(dtype)
    rows = random_pairs(8)
    logps = reference_logps(copy.deepcopy(model), pairs_of(rows)).tolist()
    rows = [{**row, "ref_chosen_logps": c, "ref_rejected_logps": r} for row, (c, r) in zip(rows, logps, strict=True)]
    trainer_of(model, rows, tokenizer, tmp_path, logging_steps=1, max_steps=8, learning_rate=1e-9).train()
    assert "the loss is still 0.69" in caplog.text
    said = "of the weights, which are bfloat16 without a float32 copy, are too large to be moved by a step of this learning"
    assert (said in caplog.text) == named


@pytest.mark.parametrize("learning_rate", [0.0, 1e-2])
def test_a_training_that_does_not_learn_says_so(learning_rate, tokenizer, tmp_path, caplog):
    model = model_of("llama")
    rows = random_pairs(8)
    logps = reference_logps(copy.deepcopy(model), pairs_of(rows)).tolist()
    rows = [{**row, "ref_chosen_logps": c, "ref_rejected_logps": r} for row, (c, r) in zip(rows, logps, strict=True)]
    train(tokenizer, tmp_path, rows, max_steps=8, learning_rate=learning_rate, lr_scheduler_type="constant")
    assert ("the loss is still 0.6931" in caplog.text) == (learning_rate == 0.0)
