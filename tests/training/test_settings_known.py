"""What training programs say of settings that are not theirs, of models out of reach, and of reports without a login."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl

from baton import sources
from baton.errors import InputError
from baton.training import known, reports
from baton.training.arguments import parse_training
from tests.programs import ROOT

PROGRAMS = {program: program.removesuffix(".py").replace("/", ".") for program in known.CONFIGS}


@pytest.mark.parametrize("name", known.CONFIGS.values())
def test_the_fields_read_from_the_source_are_those_of_the_class(name):
    fields = {field.name for field in dataclasses.fields(getattr(trl, name)) if field.init}
    assert known.config_fields(name) == fields and len(fields) > 100


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_arguments_read_from_a_programs_source_are_its_own(program):
    arguments = importlib.import_module(PROGRAMS[program]).Arguments
    assert set(known._fields(ROOT / program, "Arguments")) == set(arguments.model_fields)


def parse(program, *flags):
    module = importlib.import_module(PROGRAMS[program])
    return parse_training(program, module.Arguments, "", module.config_class, [*flags, "--output_dir", "o"])


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("dpo_iteration/run_kto.py", ["--choose_type", "max_min"],
         "`choose_type` is a setting of dpo_iteration/run_dpo.py, and run_kto.py does nothing with it"),
        ("dpo_iteration/run_dpo.py", ["--desirable_weight", "1"],
         "`desirable_weight` is a setting of dpo_iteration/run_kto.py"),
        ("sft/run_sft.py", ["--beta", "0.1"], "`beta` is a setting of dpo_iteration/run_dpo.py and dpo_iteration/run_kto.py"),
        ("reward_model/run_rm.py", ["--response_key", "5"], "`response_key` is a setting of sft/run_sft.py"),
        ("dpo_iteration/run_kto.py", ["--desirable_wieght", "1"],
         "unknown setting `desirable_wieght`: did you mean `desirable_weight`"),
    ],
)  # fmt: skip
def test_a_setting_of_another_program_names_that_program(program, flags, message):
    with pytest.raises(InputError, match=message):
        parse(program, *flags)


@pytest.mark.parametrize("program", PROGRAMS)
def test_openrlhfs_names_are_those_of_the_programs_settings(program, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    given = {"pretrain": "a/b", "dataset": "d", "max_len": "64", "lora_rank": "8", "l2": "0.1", "max_epochs": "2"}
    given |= {"max_samples": "9", "train_batch_size": "64", "micro_train_batch_size": "4", "flash_attn": "true"}
    given |= {"teacher_model": "c/d"} if "distillation" in program else {}
    arguments, settings = parse(program, *(word for name, value in given.items() for word in (f"--{name}", value)))
    assert arguments.model_name_or_path == "a/b" and arguments.dataset_name_or_path == "d" and arguments.max_length == 64
    assert arguments.use_peft and arguments.lora_r == 8
    assert 9 in (getattr(arguments, "max_samples", None), getattr(arguments, "max_training_samples", None))
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    assert settings == batch | {"weight_decay": "0.1", "num_train_epochs": "2"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--zero_stage", "3"], "`zero_stage` of OpenRLHF: here `accelerate launch --config_file configs/zero2.yaml`"),
        (["--pretrain", "a", "--model_name_or_path", "b"], "`pretrain` and `model_name_or_path` are two names of one setting"),
        (["--train_batch_size", "7", "--micro_train_batch_size", "2"], "7 is no multiple of 1 processes x"),
        (["--train_batch_size", "8", "--gradient_accumulation_steps", "2"], "both say how large a batch is"),
        (["--micro_train_batch_size", "2"], "`micro_train_batch_size` splits a batch: give `train_batch_size` beside it"),
        (["--flash_attn", "false"], "`flash_attn` is always True here"),
        (["--ipo", "--loss_type", "hinge"], "`ipo` and `loss_type` both name a loss"),
    ],
)
def test_what_openrlhf_says_and_baton_decides_elsewhere_is_refused(flags, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse("dpo_iteration/run_dpo.py", *flags)


def batch_of(folder, file, *flags):
    """The factors of a batch that a YAML file and flags give."""
    (folder / "sft.yaml").write_text(file)
    words = [str(folder / "sft.yaml"), "--model_name_or_path", "a/b", "--dataset_name_or_path", "d"]
    return parse("sft/run_sft.py", *words, *flags)[1]


def test_flags_override_the_files_batch_name_by_name(tmp_path):
    batch = "train_batch_size: 64\nmicro_train_batch_size: 4\n"
    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 16}
    assert batch_of(tmp_path, batch) == whole
    assert batch_of(tmp_path, batch, "--train_batch_size", "32") == whole | {"gradient_accumulation_steps": 8}
    assert batch_of(tmp_path, batch, "--micro_train_batch_size", "16") == dict.fromkeys(whole, 4) | {
        "per_device_train_batch_size": 16
    }
    both = [word for name, value in whole.items() for word in (f"--{name}", str(value))]
    assert batch_of(tmp_path, "train_batch_size: 8\n", *both) == {name: str(value) for name, value in whole.items()}
    factors = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 2\n"
    assert batch_of(tmp_path, factors, "--train_batch_size", "64", "--micro_train_batch_size", "4") == whole


@pytest.mark.parametrize("flag", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_factor_as_a_flag_beside_the_files_whole_batch_is_refused(tmp_path, flag):
    with pytest.raises(InputError, match=f"`train_batch_size` and `{flag}` both say how large a batch is"):
        batch_of(tmp_path, "train_batch_size: 64\n", f"--{flag}", "4")


def test_an_unknown_setting_is_refused_before_torch_or_trl_is_imported():
    words = [sys.executable, "-X", "importtime", "dpo_iteration/run_dpo.py", "configs/training.yaml", "--lerning_rate", "1"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown setting `lerning_rate`: did you mean `learning_rate`?" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "yaml" in imported and not imported & {"torch", "trl", "transformers"}


def test_what_a_library_says_of_a_missing_file_is_one_line_and_what_the_system_says_stays():
    with pytest.raises(InputError, match=r"^here: cannot be loaded: no weights$"), sources.loading("here", "here"):
        raise OSError("no weights\nand much more")
    with pytest.raises(OSError, match="full") as error, sources.loading("here"):
        raise OSError(28, "full")
    assert not isinstance(error.value, InputError)


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user who has no wandb login; returns the home folder."""
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_BASE_URL", "NETRC", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_CONFIG_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wandb_without_a_login_is_refused_with_the_command_that_is_there(nobody):
    said = f"{sys.prefix}/bin/wandb login, or WANDB_API_KEY=…; or WANDB_MODE=offline"
    with pytest.raises(InputError, match=re.escape(said)):
        reports.check_outside({"report_to": "wandb"}, [], ahead=True)
    reports.check_outside({"report_to": "tensorboard"}, [], ahead=True)
    reports.check_outside({}, [], ahead=True)


@pytest.mark.parametrize("login", ["WANDB_MODE=offline", "WANDB_API_KEY=x", ".netrc", "settings"])
def test_every_way_to_log_in_to_wandb_is_known(nobody, monkeypatch, login):
    if login == ".netrc":
        (nobody / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
        (nobody / ".netrc").chmod(0o600)
    elif login == "settings":
        (nobody / "wandb").mkdir()
        (nobody / "wandb/settings").write_text("[default]\nmode = offline\n")
    else:
        monkeypatch.setenv(*login.split("="))
    reports.check_outside({"report_to": ["wandb"]}, [], ahead=False)


@pytest.mark.parametrize("path", ["policy/metrics.jsonl", "policy.partial/metrics.jsonl", "policy"])
def test_a_file_in_the_output_which_would_be_deleted_at_the_end_is_refused(tmp_path, path):
    with pytest.raises(InputError, match=r"--metrics_path .*: lies in the output .*; give a path beside it"):
        sources.refuse_input(tmp_path / path, {}, "--metrics_path", tmp_path / "policy")
    for there in (tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="what is there is no file"):
            sources.refuse_input(there, {}, "--metrics_path", tmp_path / "policy")
    sources.refuse_input(tmp_path / "policy.metrics.jsonl", {}, "--metrics_path", tmp_path / "policy")
