"""Training in one process, in several under DDP, ZeRO-2 and ZeRO-3, and FSDP: the same numbers, and the same model saved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from baton.training.memory import Sharding, estimate_reference
from baton.training.reference import reference_logps
from tests.programs import launch
from tests.training.test_dpo_core import bloom, model_of, pairs_of, random_pairs, tokenizer
from tests.training.test_resume_layouts import GLOO, zero
from tests.training.test_training_programs import SMALL
from tests.training.test_what_a_run_says import config_of

__all__ = ["tokenizer"]  # a fixture

LN_2 = 0.693147

# The training programs

STEPS, BATCH = 3, 8
PROGRAMS = {
    "sft/run_sft.py": ("data/sft.jsonl", []),
    "reward_model/run_rm.py": ("data/rm_train.jsonl", []),
    # In rows of a few pairs; the third step has one pair, so that of two processes one has none.
    "dpo_iteration/run_dpo.py": (
        "data/rm_train.jsonl",
        ["--max_prompt_length", 64, "--max_training_samples", 2 * BATCH + 1, "--tokens_per_row", 200],
    ),
    "dpo_iteration/run_kto.py": ("data/rm_train.jsonl", ["--max_prompt_length", 64]),
}


def trained(program, layout, task, folder, *more):
    """The losses that a program logs in a layout, unrounded; the model is in `folder/out`."""
    (data, words), environment = PROGRAMS[program], {}
    count = 1 if layout == "one process" else 2
    if layout.startswith("ZeRO"):
        environment = zero(int(layout[-1]))
        words = [*words, *(f"--{word}" if place % 2 == 0 else word for place, word in enumerate(GLOO))]
    folder.mkdir(parents=True)
    codes, errors = launch(
        count, folder, Path(__file__).with_name("layout_processes.py"), folder / "losses", program,
        "--model_name_or_path", task / "base", "--dataset_name_or_path", task / data, "--output_dir", folder / "out",
        "--max_steps", STEPS, "--learning_rate", 1e-3, "--max_length", 128, "--per_device_train_batch_size", BATCH // count,
        *SMALL, *words, *more, **environment,
    )  # fmt: skip
    assert set(codes) == {0}, errors[-3000:]
    return [json.loads(line) for line in (folder / "losses").read_text().splitlines()]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_trains_and_saves_the_same_in_every_layout(program, task, tmp_path):
    layouts = ("one process", "DDP", "ZeRO-2", "ZeRO-3")
    losses = {layout: trained(program, layout, task, tmp_path / layout) for layout in layouts}
    for layout in layouts:  # the table: pytest -s
        print(f"{program:<26} {layout:<12}", *(f"{loss:.6f}" for loss in losses[layout]))
    assert len(losses["DDP"]) == STEPS
    whole = load_file(tmp_path / "one process/out/model.safetensors")
    for layout in layouts[1:]:
        assert losses[layout] == pytest.approx(losses["one process"], abs=1e-5), layout
        saved = load_file(tmp_path / layout / "out/model.safetensors")
        assert saved.keys() == whole.keys(), layout
        assert max((saved[name] - whole[name]).abs().max() for name in whole) < 3e-4, layout
    if program != "reward_model/run_rm.py":
        pairs = [([5, 6, 7], [8, 9, 10], [11, 12])]
        one, *others = (AutoModelForCausalLM.from_pretrained(tmp_path / layout / "out") for layout in layouts)
        for other in others:
            torch.testing.assert_close(reference_logps(other, pairs), reference_logps(one, pairs), rtol=0, atol=1e-3)


def test_a_regression_on_responses_that_share_prompts_is_the_same_in_two_processes(task, annotated, tmp_path):
    words = ["--dataset_name_or_path", annotated, "--loss_type", "regression", "--tokens_per_row", 120]
    losses, scores = {}, {}
    for layout in ("one process", "ZeRO-3"):
        losses[layout] = trained("reward_model/run_rm.py", layout, task, tmp_path / layout, *words)
        manifest = json.loads((tmp_path / layout / "out.manifest.json").read_text())
        scores[layout] = manifest["held_out"]["heads"]["reward"]
        assert losses[layout] == pytest.approx(losses["one process"], abs=1e-5) and len(losses[layout]) == STEPS
        for name in ("mse", "pearson", "spearman", "accuracy"):
            assert scores[layout][name] == pytest.approx(scores["one process"][name], abs=1e-3), (layout, name)


def test_a_reference_in_memory_is_sharded_too(task, tmp_path):
    words = ["--forward", "trl", "--ref_model", task / "base", "--max_training_samples", STEPS * BATCH]  # no short step
    whole, sharded = (
        trained("dpo_iteration/run_dpo.py", layout, task, tmp_path / layout, *words) for layout in ("one process", "ZeRO-3")
    )
    assert whole[0] == pytest.approx(LN_2, abs=1e-5) and sharded == pytest.approx(whole, abs=1e-5)


# The reference


@pytest.fixture(scope="module")
def material(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sharded")
    model_of("llama").save_pretrained(folder / "model")
    bloom().save_pretrained(folder / "unpackable")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "rows.json").write_text(json.dumps(random_pairs(16)))
    return folder


def run_of(material, folder, count, mode, **environment):
    """What the processes of `sharded_processes.py` found."""
    script = Path(__file__).with_name("sharded_processes.py")
    codes, errors = launch(count, folder, script, material, folder, mode, **environment)
    assert set(codes) == {0}, errors[-3000:]
    return json.loads((folder / f"{mode}.json").read_text())


def reference_of(material, name):
    rows = json.loads((material / "rows.json").read_text())
    return reference_logps(AutoModelForCausalLM.from_pretrained(material / name), pairs_of(rows)).numpy()


@pytest.mark.parametrize("layout", ["DDP", "ZeRO-2", "ZeRO-3"])
def test_policy_and_reference_agree_at_the_first_step_in_bfloat16(layout, material, tmp_path):
    environment = zero(int(layout[-1])) if layout.startswith("ZeRO") else {}
    found = run_of(material, tmp_path, 2, "launched", **environment)
    assert found["losses"][0] == pytest.approx(LN_2, abs=1e-4) and abs(found["rewards"][0]) < 1e-4
    assert found["losses"][1] < LN_2 - 0.01
    np.testing.assert_allclose(found["reference"], reference_of(material, "model"), atol=0.5)


def test_under_fsdp_the_reference_is_sharded_and_computes_as_the_policy(material, tmp_path):
    found = run_of(material, tmp_path, 3, "fsdp")
    for name in ("model", "unpackable"):
        np.testing.assert_allclose(found[f"{name} float32"], reference_of(material, name), atol=1e-3)
    half, policy = np.array(found["model bfloat16"]), np.array(found["policy bfloat16"])
    np.testing.assert_allclose(half, policy, atol=1e-3)
    assert 1e-3 < np.abs(half - reference_of(material, "model")).max() < 1
    gone_on = np.array(found["model gone on"])
    kept = gone_on == 7
    assert 0 < kept.sum() < kept.size / 2
    np.testing.assert_allclose(np.where(kept, 7, reference_of(material, "model")), gone_on, atol=1e-3)
    np.testing.assert_allclose(found["in TRL's forward pass"], np.array(found["model float32"])[:, 0], atol=1e-3)


@pytest.mark.parametrize("deepspeed", [True, False])
def test_the_reference_counts_one_processs_share_where_it_is_sharded(deepspeed):
    model, config = model_of("llama"), config_of(bf16=True)
    weights = sum(parameter.numel() for parameter in model.parameters())
    size = 2 if deepspeed else 4
    assert estimate_reference(model, config, Sharding(8, 3, deepspeed))["weights"] == weights * size / 8
    assert estimate_reference(model, config, Sharding(8, 2 if deepspeed else 0, deepspeed))["weights"] == weights * 4
