"""Mixed models are the weighted sum of their weights, with the first one's configuration and tokenizer; others are refused."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from baton.training import export
from tests.models.tiny_models import model_of
from tests.programs import ROOT, run_program
from tests.training.test_dpo_core import tokenizer

__all__ = ["tokenizer"]  # a fixture


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """Three models of one shape; the second one's weights are in several files."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for number in range(3):
        model = model_of("llama-tied").to(torch.bfloat16 if number == 0 else torch.float32)
        torch.manual_seed(number)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(folder / str(number), max_shard_size="10KB" if number == 1 else "1GB")
    tokenizer.save_pretrained(folder / "0")
    return folder


def mix(models, output, *words):
    program = "dpo_iteration/mix_models.py"
    return run_program(program, "--models", *(models / name for name in ("0", "1", "2")), "--output_dir", output, *words)


def weights_of(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())


def test_a_mix_is_the_weighted_sum_with_the_first_models_configuration_and_tokenizer(models, tmp_path):
    done = mix(models, tmp_path / "mixed", "--weights", 1.5, -0.75, 0.25, "--export_dtype", "float32")
    assert done.returncode == 0, done.stderr
    parts = [weights_of(models / name) for name in ("0", "1", "2")]
    for name, value in weights_of(tmp_path / "mixed").items():
        torch.testing.assert_close(value, 1.5 * parts[0][name] - 0.75 * parts[1][name] + 0.25 * parts[2][name])
    assert (tmp_path / "mixed/tokenizer.json").read_bytes() == (models / "0/tokenizer.json").read_bytes()
    configuration = json.loads((tmp_path / "mixed/config.json").read_text())
    assert configuration["dtype"] == "float32" and configuration["architectures"] == ["LlamaForCausalLM"]
    manifest = json.loads((tmp_path / "mixed.manifest.json").read_text())
    assert manifest["counts"]["out"] == len(load_file(models / "0/model.safetensors"))
    again = mix(models, tmp_path / "mixed", "--weights", 1.5, -0.75, 0.25, "--export_dtype", "float32")
    assert again.returncode == 0 and "up to date" in again.stderr
    other = mix(models, tmp_path / "mixed", "--weights", 0.5, 0.25, 0.25, "--export_dtype", "float32")
    assert other.returncode == 2 and "weights" in other.stderr


def test_a_mix_in_files_of_the_first_models_dtype_is_loaded_whole(models, tmp_path, monkeypatch):
    from dpo_iteration.mix_models import mix as mix_in_process

    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/model-00001.safetensors").write_bytes(b"of a death")
    mix_in_process([str(models / "0"), str(models / "1")], [0.6, 0.4], tmp_path / "mixed", "checkpoint")
    assert len(list((tmp_path / "mixed").glob("*.safetensors"))) > 2
    parts = [weights_of(models / name) for name in ("0", "1")]
    for name, value in weights_of(tmp_path / "mixed").items():
        torch.testing.assert_close(value, (0.6 * parts[0][name] + 0.4 * parts[1][name]).bfloat16().float())


def test_a_recipes_reference_follows_the_policy_from_round_2_on(tmp_path):
    for name, config in (("policy", {}), ("reward", {"architectures": ["X"], "num_labels": 1})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        for file in ("model.safetensors", "tokenizer.json"):
            (tmp_path / name / file).write_text("")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    recipe, run = tmp_path / "own.env", tmp_path / "run"
    text = f"INITIAL_POLICY={tmp_path}/policy\nREWARD_MODEL={tmp_path}/reward\nPROMPTS=({tmp_path}/prompts.jsonl)\nGPUS=0\n"
    outcomes = []
    for alpha in (".6", "1.5"):
        recipe.write_text(text + f"ROUNDS=3\nREFERENCE=mix:{alpha}\n")
        command = ["bash", "scripts/run_loop.sh", recipe, "--run_dir", run, "--plan"]
        outcomes.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
    planned, refused = outcomes
    assert planned.returncode == 0, planned.stderr
    mixed = [line.split("--models ")[1] for line in planned.stdout.splitlines() if "mix_models.py" in line]
    assert mixed == [
        f"{run}/round1/policy {tmp_path}/policy --weights .6 0.4 --output_dir {run}/round2/reference",
        f"{run}/round2/policy {run}/round2/reference --weights .6 0.4 --output_dir {run}/round3/reference",
    ]
    references = [line.split("--ref_model ")[1].split()[0] for line in planned.stdout.splitlines() if "run_dpo.py" in line]
    assert references == [f"{tmp_path}/policy", f"{run}/round2/reference", f"{run}/round3/reference"]
    assert refused.returncode == 2 and "ALPHA between 0 and 1" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weights", 0.5, 0.5), "`weights`: 2 for 3 models"),
        (("--weights", 0.5, 0.5, 0.1), "`weights` must sum to 1, not 1.1"),
    ],
)
def test_weights_that_make_no_sense_are_refused(words, message, models, tmp_path):
    done = mix(models, tmp_path / "mixed", *words)
    assert done.returncode == 2 and message in done.stderr


def test_models_of_other_shapes_or_tensors_are_refused(models, tmp_path):
    from baton.errors import InputError
    from dpo_iteration.mix_models import mix as mix_in_process

    tensors = load_file(models / "2/model.safetensors")
    name = "model.norm.weight"
    for number, (changed, message) in enumerate(
        (
            (tensors | {name: tensors[name][:-1].clone()}, f"other shapes than .*: {name}$"),
            (
                {key: value for key, value in tensors.items() if key != name},
                f"other tensors than .*: {name} stand in one alone",
            ),
            (None, "has no safetensors files"),
        )
    ):
        other = tmp_path / str(number)
        other.mkdir()
        (other / "config.json").write_bytes((models / "2/config.json").read_bytes())
        if changed is not None:
            save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            mix_in_process([str(models / "0"), str(other)], [0.5, 0.5], tmp_path / "mixed", "checkpoint")
