"""What training programs say of settings that are not theirs, of models out of reach, and of reports without a login."""

import dataclasses
import http.server
import importlib
import logging
import os
import re
import subprocess
import sys
import threading

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
        ("reward_model/run_rm.py", ["--max_samples", "5"], "`max_samples` is a setting of sft/run_sft.py"),
        ("dpo_iteration/run_kto.py", ["--desirable_wieght", "1"],
         "unknown setting `desirable_wieght`: did you mean `desirable_weight`"),
    ],
)  # fmt: skip
def test_a_setting_of_another_program_names_that_program(program, flags, message):
    with pytest.raises(InputError, match=message):
        parse(program, *flags)


def test_an_unknown_setting_is_refused_before_torch_or_trl_is_imported():
    words = [sys.executable, "-X", "importtime", "dpo_iteration/run_dpo.py", "configs/training.yaml", "--lerning_rate", "1"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown setting `lerning_rate`: did you mean `learning_rate`?" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "yaml" in imported and not imported & {"torch", "trl", "transformers"}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hugging Face hub does to whether a model may be read."""

    def do_GET(self):
        code, error = {"open": (200, ""), "gated": (403, "GatedRepo"), "none": (404, "RepoNotFound")}[self.path.split("/")[4]]
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub at an address of this machine, and an empty cache."""
    from huggingface_hub import constants, file_download, hf_api

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_api, "ENDPOINT", address, raising=False)
    monkeypatch.setattr(file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "message"),
    [("baton/gated", "baton/gated: a gated model: ask for access"), ("baton/none", "baton/none: not on the Hugging Face hub")],
)
def test_a_model_that_cannot_be_fetched_is_one_message(hub, model, message):
    sources.check_hub("baton/open")
    with pytest.raises(InputError, match=message):
        sources.check_hub(model)


def test_a_hub_that_does_not_answer_is_an_error_where_work_begins_and_a_warning_ahead_of_it(hub, caplog):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(InputError, match="baton/open: not on this machine, and the Hugging Face hub does not answer"):
        sources.check_hub("baton/open")
    with caplog.at_level(logging.WARNING, logger="baton"):
        sources.check_hub("baton/open", ahead=True)
    assert "the Hugging Face hub does not answer" in caplog.text


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
