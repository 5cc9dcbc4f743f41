"""A model folder is written whole, by the checkpoint's names, from sharded models too, and by a run that died in writing it."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.core_model_loading import revert_weight_conversion

from baton.training import export, float32_copy
from baton.training.export import Checkpoint, Rounding, copies_without_zero, layer_of, tensors_of, write_model
from baton.training.float32_copy import layer_in_files
from tests.models.tiny_models import SHAPE, model_of, one_thread, pairs_of, random_pairs
from tests.programs import launch
from tests.training.test_dpo_core import tokenizer
from tests.training.test_resume_layouts import GLOO, material, training_run, zero

__all__ = ["material", "one_thread", "tokenizer"]  # fixtures

SCRIPT = "tests/training/export_processes.py"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(export, "SHARD_BYTES", 8000)


def saved(model, folder):
    """A model as Transformers saves it, and as it loads it again."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors_in(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


MIXTRAL = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "mixtral"])
def test_the_folder_has_the_tensors_of_the_checkpoint_by_its_names_in_shards(family, tmp_path, small_shards):
    made = AutoModelForCausalLM.from_config(MIXTRAL) if family == "mixtral" else model_of(family)
    model = saved(made.bfloat16(), tmp_path / "start")
    for parameter in model.parameters():
        parameter.data += 1e-3
    (tmp_path / "out").mkdir()
    for name in ("model-00001.safetensors", "model-00002-of-00009.safetensors", "model.safetensors"):
        (tmp_path / "out" / name).write_bytes(b"of an export that did not come to its end")
    facts = write_model(model, tensors_of(model), tmp_path / "out", str(tmp_path / "start"), "checkpoint")
    before, after = tensors_in(tmp_path / "start"), tensors_in(tmp_path / "out")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {name: (t.shape, t.dtype) for name, t in after.items()}
    assert all(torch.equal((before[name].float() + 1e-3).bfloat16(), after[name]) for name in before)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3 and 0 < facts["export_lost"] < 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == again.config.dtype == torch.bfloat16
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    ids = torch.arange(3, 20)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_experts_and_layers_of_any_model_are_grouped_by_their_layer():
    assert layer_of("model.layers.3.mlp.experts.7.w1.weight") == "model.layers.3"
    assert layer_of("lm_head.weight") == "lm_head.weight"


def test_a_float32_checkpoint_stays_float32_and_parts_in_another_dtype_keep_theirs(tmp_path):
    model = saved(model_of("llama"), tmp_path / "start")
    write_model(model, tensors_of(model), tmp_path / "out", str(tmp_path / "start"), "checkpoint")
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {torch.float32}
    mixed = model_of("llama").bfloat16()
    mixed.model.norm.float()
    model = saved(mixed, tmp_path / "mixed")
    write_model(model, tensors_of(model), tmp_path / "out", str(tmp_path / "mixed"), "checkpoint")
    dtypes = {name: tensor.dtype for name, tensor in tensors_in(tmp_path / "out").items()}
    assert dtypes.pop("model.norm.weight") == torch.float32 and set(dtypes.values()) == {torch.bfloat16}


def test_what_rounding_takes_away_is_a_share_of_the_update_and_new_tensors_are_left_out():
    start, trained = torch.tensor([1.0, 1.0]).bfloat16(), torch.tensor([1.001, 1.0078125])
    rounding = Rounding()
    rounding.add("a", trained, trained.bfloat16(), start)
    rounding.add("new", trained, trained.bfloat16(), None)
    lost, update = torch.tensor([0.001, 0.0]), trained - 1
    share = (lost.norm() / update.norm()).item()
    assert rounding.new == ["new"]
    assert rounding.facts() == {
        "export_lost": pytest.approx(share, rel=1e-3),
        "export_lost_in_16_bits": pytest.approx(share, rel=1e-3),
        "export_changed": 0.5,
    }


@pytest.mark.parametrize("mode", ["2", "3", "fsdp"])
def test_the_float32_weights_that_two_processes_hold_are_exported_not_the_ones_that_compute(mode, tmp_path):
    model_of("llama-tied").bfloat16().save_pretrained(tmp_path / "model")
    rows = [{"prompt_ids": prompt, "chosen_ids": chosen} for prompt, chosen, _ in pairs_of(random_pairs(40))]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    environment = {} if mode == "fsdp" else zero(mode)
    codes, errors = launch(2, tmp_path, SCRIPT, mode, tmp_path, tmp_path / "out", **environment)
    assert codes == [0, 0], errors[-3000:]
    start, after = tensors_in(tmp_path / "model"), tensors_in(tmp_path / "out")
    computed = torch.load(tmp_path / "out/computed.pt", weights_only=True)
    assert start.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
    for name, tensor in after.items():
        moved = (tensor - start[name].float()).abs()
        assert 0 < moved.max() < 1e-5
        assert torch.equal(tensor.bfloat16(), computed[name])
    facts = json.loads((tmp_path / "out/facts.json").read_text())
    assert facts["export_lost"] == 0 and facts["export_lost_in_16_bits"] > 0.5 and facts["export_changed"] > 0.9


@pytest.fixture(scope="module")
def whole_run(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    codes, errors = training_run(material, folder / "policy", (1, 4, 1))
    assert codes == [0], errors[-3000:]
    return load_file(folder / "policy.partial/model.safetensors")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_training_under_zero_exports_what_one_process_exports(stage, material, whole_run, tmp_path):
    codes, errors = training_run(material, tmp_path / "policy", (2, 2, 1), *GLOO, **zero(stage))
    assert codes == [0, 0], errors[-3000:]
    policy = load_file(tmp_path / "policy.partial/model.safetensors")
    assert policy.keys() == whole_run.keys()
    assert all((policy[name] - whole_run[name]).abs().max() < 1e-5 for name in policy)
    assert (tmp_path / "policy.partial/tokenizer.json").exists()


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_the_files_values_are_those_that_transformers_loads_and_none_where_they_have_none(family, tmp_path):
    made = AutoModelForCausalLM.from_config(MIXTRAL) if family == "mixtral" else model_of(family)
    model = saved(made, tmp_path / "start")
    weights = {name: weight for name, weight in model.named_parameters() if ".layers.1." in name}
    new = torch.nn.Parameter(torch.zeros(1, 32))
    with torch.no_grad(), Checkpoint(str(tmp_path / "start")) as checkpoint:
        values = layer_in_files(model, {**weights, "score.weight": new}, checkpoint)
    assert values.keys() == weights.keys()
    assert all(torch.equal(values[name], weights[name]) for name in weights)


def test_weights_of_which_the_files_hold_a_part_are_named_and_places_are_counted_in_64_bits(tmp_path, monkeypatch, caplog):
    model = saved(AutoModelForCausalLM.from_config(MIXTRAL), tmp_path / "start")
    tensors = load_file(tmp_path / "start/model.safetensors")
    del tensors[next(name for name in tensors if ".layers.1." in name and ".experts.0." in name)]
    save_file(tensors, tmp_path / "start/model.safetensors", {"format": "pt"})
    dtypes = set()

    def revert(model, tensors):
        dtypes.update(tensor.dtype for tensor in tensors.values())
        return revert_weight_conversion(model, tensors)

    monkeypatch.setattr(float32_copy, "revert_weight_conversion", revert)
    weights = {name: weight for name, weight in model.named_parameters() if ".layers.1." in name}
    with torch.no_grad(), Checkpoint(str(tmp_path / "start")) as checkpoint:
        values = layer_in_files(model, weights, checkpoint)
    (missed,) = weights.keys() - values.keys()
    assert f"its files hold a part of {missed}, whose float32 copy starts rounded" in caplog.text
    assert dtypes == {torch.float32, torch.int64}  # the shapes alone, and the places


def test_without_zero_the_float32_copies_are_those_of_deepspeeds_fused_adam_too():
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    model = torch.nn.Linear(4, 3).bfloat16()
    optimizer = FP16_Optimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.0), low_precision_dtype=torch.bfloat16)
    copies = copies_without_zero(optimizer)
    copies[id(model.bias)].detach().fill_(7)
    assert {name: copies[id(weight)].shape for name, weight in model.named_parameters()} == {"weight": (3, 4), "bias": (3,)}
    assert optimizer.fp32_groups_flat[0][-3:].tolist() == [7, 7, 7]


@pytest.mark.parametrize(("stage", "processes"), [(0, 1), (2, 2), (3, 3)])
def test_what_bfloat16_does_not_hold_of_a_float32_start_is_trained_on_under_deepspeed(stage, processes, material, tmp_path):
    one_small_step = ("bf16", True, "max_steps", 1, "learning_rate", 1e-9, "weight_decay", 0)
    codes, errors = training_run(material, tmp_path / "policy", (processes, 1, 1), *GLOO, *one_small_step, **zero(stage))
    assert set(codes) == {0}, errors[-3000:]
    start, policy = tensors_in(material / "model"), tensors_in(tmp_path / "policy.partial")
    assert start.keys() == policy.keys() and {tensor.dtype for tensor in policy.values()} == {torch.float32}
    assert all((policy[name] - start[name]).abs().max() < 1e-7 for name in start)
    assert max((start[name].bfloat16() - start[name]).abs().max() for name in start) > 1e-4


def test_a_death_in_the_middle_of_the_export_loses_nothing(material, whole_run, tmp_path):
    codes, errors = training_run(material, tmp_path / "policy", (1, 4, 1), "die_in_export", True)
    assert codes == [-signal.SIGKILL], errors[-3000:]
    assert (tmp_path / "policy.partial/model-00001.safetensors").exists()
    codes, errors = training_run(material, tmp_path / "policy", (1, 4, 1))
    _, found, resumed = errors.partition("going on from")
    assert codes == [0] and found and "(step 8)" in resumed and "grad_norm" not in resumed, errors[-3000:]
    assert {path.name for path in (tmp_path / "policy.partial").glob("*.safetensors")} == {"model.safetensors"}
    policy = load_file(tmp_path / "policy.partial/model.safetensors")
    assert all(torch.equal(policy[name], whole_run[name]) for name in whole_run)
