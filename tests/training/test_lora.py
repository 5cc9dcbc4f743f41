"""LoRA as users run it: what is trained, what is saved, merged and resumed, and what is refused."""

import logging
import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from baton.errors import InputError
from baton.sources import check_start
from baton.training.adapters import LoraArguments, adapter_config, check_lora
from baton.training.memory import outline
from baton.training.reference import reference_logps
from baton.training.sharding import unsharded
from dpo_iteration import run_dpo
from tests.programs import read_jsonl

STEPS = 4


class Lines(logging.Handler):
    """Keeps the lines of the log, and interrupts the program at one of them."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.lines, self.interrupt_at = [], interrupt_at

    def emit(self, record):
        self.lines.append(record.getMessage())
        if self.interrupt_at and self.lines[-1].startswith(self.interrupt_at):
            raise KeyboardInterrupt


def train(task, annotated, output, *more, interrupt_at=None):
    """Run run_dpo.py's main with an adapter on every linear layer; the lines of its log."""
    words = [
        "--model_name_or_path", task / "base", "--dataset_name_or_path", annotated, "--output_dir", output, "--use_cpu", "true",
        "--bf16", "false", "--max_length", 128, "--max_prompt_length", 64, "--learning_rate", 1e-2, "--max_steps", STEPS,
        "--per_device_train_batch_size", 4, "--logging_steps", 1, "--save_steps", 2,
        "--use_peft", "--lora_r", 4, "--lora_target_modules", "all-linear", *more,
    ]  # fmt: skip
    handler, logger = Lines(interrupt_at), logging.getLogger("baton")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["run_dpo.py", *map(str, words)])
            run_dpo.main()
    except KeyboardInterrupt:
        assert interrupt_at
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return handler.lines


@pytest.fixture(scope="module")
def runs(task, annotated, tmp_path_factory):
    """The same training twice: `adapter`, and `merged`, which was interrupted and resumed; folder and lines of the first."""
    folder = tmp_path_factory.mktemp("lora")
    lines = train(task, annotated, folder / "adapter")
    train(task, annotated, folder / "merged", "--merge_adapter", interrupt_at="step 3:")
    assert not (folder / "merged").exists()
    resumed = train(task, annotated, folder / "merged", "--merge_adapter")
    assert any(line.startswith("going on from") for line in resumed)
    return folder, lines


@pytest.fixture(scope="module")
def base(task):
    return AutoModelForCausalLM.from_pretrained(task / "base")


def some_pairs(vocabulary):
    rng = random.Random(0)
    return [tuple([rng.randrange(3, vocabulary) for _ in range(size)] for size in (5, 9, 7)) for _ in range(6)]


def test_the_adapter_alone_is_saved_and_its_model_can_be_named_again(runs):
    folder, _ = runs
    assert (folder / "adapter/adapter_model.safetensors").exists() and (folder / "adapter/tokenizer.json").exists()
    assert not (folder / "adapter/model.safetensors").exists()
    with pytest.raises(InputError, match="holds an adapter without its model; train it with --merge_adapter"):
        check_start(str(folder / "adapter"))


def test_the_merged_policy_is_a_plain_folder_with_the_adapters_log_probabilities_also_after_an_interruption(runs, task, base):
    folder, _ = runs
    assert not list((folder / "merged").glob("adapter_*")) and not list((folder / "merged").glob("checkpoint-*"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(task / "base"), folder / "adapter")
    pairs = some_pairs(base.config.vocab_size)
    logps = reference_logps(merged, pairs)
    torch.testing.assert_close(logps, reference_logps(adapted.get_base_model(), pairs), atol=1e-5, rtol=1e-5)
    assert (logps - reference_logps(base, pairs)).abs().max() > 0.1


def test_only_the_layers_with_an_adapter_differ_from_the_base(runs, task):
    folder, _ = runs
    before, after = (load_file(path / "model.safetensors") for path in (task / "base", folder / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}


def test_the_base_model_is_the_reference(runs, base):
    folder, lines = runs
    first = next(line for line in lines if line.startswith("step 1:"))
    assert float(first.split(" loss ")[1].split(",")[0]) == pytest.approx(math.log(2), abs=1e-4)
    (kept,) = folder.glob("reference-logps-*.npy")  # both runs used the same
    pairs = read_jsonl(folder / "adapter.pairs.jsonl")
    assert len(np.load(kept)) == len(pairs)
    assert any(line.startswith("memory, estimated") for line in lines)


def test_training_changes_the_adapter_and_nothing_else(task, annotated, base, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig

    from dpo_iteration.trainer import PackedDPOTrainer

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, pair, strict=True)) for pair in some_pairs(base.config.vocab_size)]
    trainer = PackedDPOTrainer(
        str(task / "base"),
        args=DPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no"
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task / "base"),
        peft_config=adapter_config(LoraArguments(use_peft=True, lora_target_modules=["q_proj"])),
    )
    assert trainer.ref_model is None
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name} and all("q_proj" in name for name in changed)
    with trainer.model.disable_adapter():
        pairs = some_pairs(base.config.vocab_size)
        torch.testing.assert_close(reference_logps(trainer.model.get_base_model(), pairs), reference_logps(base, pairs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_r": 8}, "`lora_r` acts with `use_peft` only"),
        ({"merge_adapter": True}, "`merge_adapter` acts with `use_peft` only"),
        ({"load_in_4bit": True}, "`load_in_4bit` acts with `use_peft` only"),
        ({"use_peft": True, "load_in_4bit": True}, "`load_in_4bit` needs bitsandbytes"),
    ],
)
def test_settings_that_would_be_ignored_or_lack_a_package_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        check_lora(LoraArguments(**settings))


def test_modules_that_the_model_does_not_have_are_refused_before_it_is_loaded(task):
    adapter = adapter_config(LoraArguments(use_peft=True, lora_target_modules=["c_attn"]))
    with pytest.raises(InputError, match=r"`lora_target_modules`: Target modules .'c_attn'. not found"):
        outline(str(task / "base"), adapter)


@pytest.mark.parametrize("modules", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_an_adapter_of_the_output_embeddings_which_would_not_be_trained_is_refused(modules, task):
    adapter = adapter_config(LoraArguments(use_peft=True, lora_target_modules=modules))
    with pytest.raises(InputError, match=r"`lora_target_modules`: an adapter of the output embeddings \(lm_head\) would never"):
        outline(str(task / "base"), adapter)
    outline(str(task / "base"), adapter_config(LoraArguments(use_peft=True, lora_target_modules="all-linear")))


def test_a_model_that_is_merged_is_not_sharded_in_a_run_under_zero_3(task, base):
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launched.items():
            patch.setenv(name, value)
        plugin = DeepSpeedPlugin(zero3_init_flag=True)
    plugin.set_deepspeed_weakref()
    try:
        assert is_deepspeed_zero3_enabled()
        with unsharded(SimpleNamespace(deepspeed_plugin=plugin)):
            logps = reference_logps(AutoModelForCausalLM.from_pretrained(task / "base"), some_pairs(base.config.vocab_size))
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
    torch.testing.assert_close(logps, reference_logps(base, some_pairs(base.config.vocab_size)))
