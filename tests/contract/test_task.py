"""What a task is: what decides a result makes another task, how it is executed does not, and no secret is written down."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from baton import fingerprint as fingerprints
from baton.arguments import StageArguments, option, parse
from baton.errors import InputError
from baton.fingerprint import cached_commit, difference, fingerprint
from baton.launch.unit import Unit, command_line
from baton.manifest import read_manifest
from baton.secrets import is_secret
from baton.servers.addresses import check_url
from baton.stage import Stage
from baton.task import spelling, trainer_settings

MIB = 1 << 20


class Arguments(StageArguments):
    K: int = option(1, "a deciding argument")
    workers: int = option(1, "an argument of execution", changes_result=False)
    api_key: SecretStr | None = option(None, "a secret", changes_result=False)
    judge_password: str | None = option(None, "a secret without its type")


def finish(output: Path, settings=None, inputs=None, arguments=None, config_class=None) -> bool:
    """Do a task to its end; returns whether there was anything to do."""
    stage = Stage.begin("test", arguments or Arguments(), output, inputs or {}, settings, config_class)
    if stage is None:
        return False
    output.write_text("done\n")
    stage.finish(records_in=1, records_out=1)
    return True


def no_config() -> type:
    raise AssertionError("the trainer's configuration is not needed here")


SAME_TASK = {
    "a flag's text for a number": ({"max_steps": 1}, {"max_steps": "1"}),
    "another spelling of a number": ({"learning_rate": 1e-6}, {"learning_rate": "0.000001"}),
    "a list of one for a value": ({"loss_type": "sigmoid"}, {"loss_type": ["sigmoid"]}),
    "a flag's words for a list": ({"loss_weights": [1.0, 0.1]}, {"loss_weights": ["1.0", "0.1"]}),
    "JSON for a mapping": ({"model_init_kwargs": {"dtype": "bfloat16"}}, {"model_init_kwargs": '{"dtype": "bfloat16"}'}),
    "reports": ({}, {"report_to": "tensorboard", "run_name": "b"}),
    "logging": ({"logging_steps": 2}, {"logging_steps": "1"}),
    "checkpoints": ({"save_steps": 50}, {"save_steps": 10, "save_total_limit": 3}),
    "memory": ({}, {"gradient_checkpointing": "true"}),
    "the device": ({}, {"use_cpu": True}),
    "attention": ({"model_init_kwargs": {"attn_implementation": "sdpa"}}, {}),
    "a smaller batch with more accumulation": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": "2", "gradient_accumulation_steps": "4"},
    ),
    "the batch's default, given": ({}, {"per_device_train_batch_size": 8}),
    "a token": ({}, {"hub_token": "hf_abc"}),
}


@pytest.mark.parametrize(("before", "now"), SAME_TASK.values(), ids=SAME_TASK)
def test_how_a_training_is_executed_and_spelled_makes_no_other_task(tmp_path, before, now):
    assert finish(tmp_path / "out", before, config_class=no_config)
    assert not finish(tmp_path / "out", now, config_class=no_config)


OTHER_TASK = {
    "steps": ({"max_steps": 1}, {"max_steps": 2}, r"max_steps \(1, now 2\)"),
    "loss": ({"beta": 0.1}, {"beta": "0.2"}, r"beta \(0.1, now 0.2\)"),
    "a larger batch": ({}, {"gradient_accumulation_steps": 2}, r"global_batch \(8, now 16\)"),
    "precision": ({"bf16": True}, {"bf16": "false"}, "bf16"),
    "several": ({"beta": 1, "seed": 1}, {"beta": 2, "seed": 2}, r"beta \(1, now 2\); seed \(1, now 2\)"),
    "the dtype of the weights": (
        {"model_init_kwargs": {"dtype": "float32"}}, {"model_init_kwargs": {"dtype": "bfloat16"}}, "model_init_kwargs",
    ),
    "saving, where the best checkpoint is kept": (
        {"load_best_model_at_end": True, "save_steps": 1}, {"load_best_model_at_end": True, "save_steps": 2}, "save_steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("before", "now", "named"), OTHER_TASK.values(), ids=OTHER_TASK)
def test_what_decides_a_training_makes_another_task_and_every_difference_is_named(tmp_path, before, now, named):
    assert finish(tmp_path / "out", before, config_class=no_config)
    with pytest.raises(InputError, match=named):
        finish(tmp_path / "out", now, config_class=no_config)


def test_more_processes_with_a_smaller_batch_are_the_same_task(tmp_path, monkeypatch):
    assert finish(tmp_path / "out", {"per_device_train_batch_size": 8}, config_class=no_config)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not finish(tmp_path / "out", {"per_device_train_batch_size": 2}, config_class=no_config)
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")  # 4 processes that are 2 copies of the model
    assert not finish(tmp_path / "out", {"per_device_train_batch_size": 4}, config_class=no_config)


values = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)


@given(values)
def test_a_value_and_its_text_have_one_spelling(value):
    assert spelling(json.dumps(value)) == spelling(value)
    assert spelling([value]) == spelling(value)
    assert spelling(spelling(value)) == spelling(value)


@given(st.dictionaries(st.sampled_from(["beta", "loss_type", "report_to", "hub_token", "model_init_kwargs"]), st.text()))
def test_settings_that_are_compared_are_plain_json_whatever_they_hold(settings):
    kept = trainer_settings(settings)
    assert json.loads(json.dumps(kept)) == kept
    assert not kept.keys() & {"report_to", "hub_token"}


def test_no_secret_reaches_a_manifest(tmp_path):
    arguments = Arguments(api_key=SecretStr("hush-1"), judge_password="hush-2")
    settings = {"hub_token": "hush-4", "push_to_hub_token": "hush-5", "model_init_kwargs": {"token": "hush-6", "dtype": "auto"}}
    output = tmp_path / "out"
    stage = Stage.begin("test", arguments, output, {}, settings, no_config)
    written = [path.read_text() for path in tmp_path.glob("*.json")]
    output.write_text("done\n")
    stage.finish(records_in=1, records_out=1)
    written += [path.read_text() for path in tmp_path.glob("*.json")]
    assert len(written) == 2
    assert not any("hush" in text for text in written)
    assert read_manifest(output)["settings"]["model_init_kwargs"] == {"dtype": "auto"}


def test_a_message_about_a_secret_does_not_show_it(tmp_path):
    (tmp_path / "config.yaml").write_text("judge_password: [hush-1, hush-2]")
    with pytest.raises(InputError) as refused:
        parse(Arguments, "", [str(tmp_path / "config.yaml")])
    assert "hush" not in str(refused.value)
    assert "judge_password" in str(refused.value)


def test_an_address_with_a_password_is_refused_without_showing_it():
    with pytest.raises(InputError, match="--url: an address with a user and a password") as refused:
        check_url("http://me:hush@127.0.0.1:8000/v1", "--url")
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("name", ["api_key", "access-token", "hf_token"])
def test_an_address_with_a_secret_in_its_query_is_refused_without_showing_it(name):
    with pytest.raises(InputError, match=f"--url: `{name}` in an address would be shown") as refused:
        check_url(f"http://127.0.0.1:8000/v1?a=1&{name}=hush", "--url")
    assert "hush" not in str(refused.value)


def test_a_token_is_a_secret_unless_it_is_a_tokenizers():
    assert all(map(is_secret, ["token", "hf_token", "auth-token", "access_token", "use_auth_token", "HF_TOKEN"]))
    kinds = "pad eos bos unk mask sep cls image".split()
    assert not any(map(is_secret, [*(f"{kind}_token" for kind in kinds), "max_new_tokens", "tokenizer"]))


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", "hush"],
        ["--hub_token=hush"],
        ["--", "--api-key", "hush"],
        ["--model_init_kwargs", '{"inner": {"token": "hush"}}'],
        ["--model_init_kwargs={'hf_token':'hush'}"],
    ],
)
def test_no_secret_is_put_on_a_command_line_that_is_started(words):
    with pytest.raises(InputError, match="give the secret in an environment variable instead") as refused:
        command_line(Unit("train", "training", ("dpo_iteration/run_dpo.py", *words)))
    assert "hush" not in str(refused.value)


def weights(folder: Path, size: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(MIB) * (size // MIB))
    return folder


def test_weights_that_change_in_the_middle_are_noticed_even_where_size_and_time_are_as_before(tmp_path):
    model = weights(tmp_path / "model", 70 * MIB)
    file = model / "model.safetensors"
    known, times = fingerprint(model), file.stat()
    with file.open("r+b") as opened:
        opened.seek(35 * MIB)
        opened.write(b"other weights")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert difference(known, model)


def test_a_folder_with_the_same_content_elsewhere_is_the_same_input(tmp_path):
    known = fingerprint(weights(tmp_path / "model", MIB))
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    assert not difference(known, tmp_path / "copy")
    (tmp_path / "copy/config.json").write_text('{"a": 1}')
    assert difference(known, tmp_path / "copy")


def test_a_models_card_is_no_part_of_the_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("What a reader should know.")
    assert difference(before, tmp_path) is None and fingerprint(tmp_path)["hash"] == before["hash"]
    (tmp_path / "config.json").write_text("{} ")
    assert "has changed" in difference(before, tmp_path)


def test_a_file_that_moves_to_another_name_in_a_folder_is_another_input(tmp_path):
    known = fingerprint(weights(tmp_path / "model", MIB))
    (tmp_path / "model/config.json").rename(tmp_path / "model/generation_config.json")
    assert difference(known, tmp_path / "model")


def test_a_finished_stage_over_large_weights_reads_none_of_them_again(tmp_path, monkeypatch):
    model = weights(tmp_path / "model", 256 * MIB)
    assert finish(tmp_path / "out", inputs={"model": model})
    monkeypatch.setattr(fingerprints, "_content_hash", no_config)  # fails where content is read
    assert not finish(tmp_path / "out", inputs={"model": model})


def on_the_hub(cache: Path, name: str, commit: str) -> None:
    """A hub cache in which `name` was last loaded at `commit`."""
    reference = cache / f"models--{name.replace('/', '--')}" / "refs/main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)


def test_a_hub_model_is_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert finish(tmp_path / "unknown", inputs={"model": "some/model"})  # never loaded here: known by its name alone
    on_the_hub(tmp_path / "hub", "some/model", "1" * 40)
    assert cached_commit("some/model") == "1" * 40
    assert finish(tmp_path / "out", inputs={"model": "some/model"})
    assert read_manifest(tmp_path / "out")["inputs"]["model"]["hash"] == f"some/model@{'1' * 40}"
    assert not finish(tmp_path / "out", inputs={"model": "some/model"})
    on_the_hub(tmp_path / "hub", "some/model", "2" * 40)
    with pytest.raises(InputError, match=r"model: some/model is at another commit than 1{40}"):
        finish(tmp_path / "out", inputs={"model": "some/model"})
    assert not finish(tmp_path / "unknown", inputs={"model": "some/model"})


def test_a_finished_stage_with_a_hub_model_asks_no_network(tmp_path):
    on_the_hub(tmp_path / "hub/hub", "some/model", "1" * 40)
    code = (
        "from pathlib import Path\nimport sys\nfrom tests.contract.test_task import finish\n"
        "worked = finish(Path(sys.argv[1]), inputs={'model': 'some/model'})\n"
        "print(worked, 'huggingface_hub.hf_api' in sys.modules)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub")}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "out")], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said == [["True", "True"], ["False", "False"]]


def test_a_manifest_of_another_version_or_of_nothing_is_named(tmp_path):
    assert finish(tmp_path / "out")
    path = tmp_path / "out.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(InputError, match="finished, of another task: it was made by another version of Baton"):
        finish(tmp_path / "out")
    for content in ("{}", "[]", "{"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"out\.manifest\.json: not .*; move it away, or start .* with --overwrite"):
            finish(tmp_path / "out")
    assert finish(tmp_path / "out", arguments=Arguments(overwrite=True))


@pytest.mark.parametrize("renamed", [False, True])
def test_a_stage_that_died_when_only_names_were_left_to_change_is_complete(tmp_path, renamed):
    output = tmp_path / "policy"
    stage = Stage.begin("train", Arguments(), output, {})
    stage.partial_folder.mkdir()
    (stage.partial_folder / "model").write_text("weights")
    (stage.partial_folder / "checkpoint-1").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "_complete", lambda self: None)  # the program dies here
        stage.finish(records_in=1, records_out=1, metrics={"loss": 0.5}, scratch=["checkpoint-*"])
    stage.lock.release()
    if renamed:
        (stage.partial_folder / "checkpoint-1").rmdir()
        stage.partial_folder.rename(output)
    assert Stage.begin("train", Arguments(), output, {}) is None
    assert [path.read_text() for path in output.iterdir()] == ["weights"]
    assert read_manifest(output)["metrics"] == {"loss": 0.5} and "scratch" not in read_manifest(output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "policy.manifest.json"]


def test_an_output_in_its_own_input_is_refused(tmp_path):
    model = weights(tmp_path / "model", MIB)
    with pytest.raises(InputError, match="the output cannot lie in the input `model`"):
        finish(model / "out", inputs={"model": model})


@pytest.mark.parametrize("place", ["~", "~/models"])
def test_no_folder_called_tilde_is_made_and_a_missing_path_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="only a shell replaces ~"):
        finish(Path(place, "out"))
    assert not list(tmp_path.iterdir())
    for path, where in ((f"{place}/data.jsonl", "only a shell"), ("data.jsonl", f"relative paths start at {tmp_path}")):
        with pytest.raises(InputError, match=f"no such file or folder .*{where}"):
            finish(tmp_path / "out", inputs={"dataset": path})


def test_what_is_not_split_evenly_counts_where_the_rest_is_dropped(tmp_path):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    assert finish(tmp_path / "out", settings, config_class=no_config)
    with pytest.raises(InputError, match="batch_split"):
        other = settings | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        finish(tmp_path / "out", other, config_class=no_config)


def test_another_global_batch_says_what_restores_it(tmp_path):
    assert finish(tmp_path / "out", {}, config_class=no_config)
    with pytest.raises(InputError, match="set gradient_accumulation_steps so that global_batch is 8 again"):
        finish(tmp_path / "out", {"per_device_train_batch_size": 4}, config_class=no_config)


def test_an_input_that_is_gone_is_named(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("{}")
    assert finish(tmp_path / "out", inputs={"data": source})
    source.unlink()
    with pytest.raises(InputError, match=r"data: .*in\.jsonl is no longer there"):
        finish(tmp_path / "out", inputs={"data": source})


def test_an_input_that_is_new_or_gone_is_named(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    assert finish(tmp_path / "out")
    with pytest.raises(InputError, match=r"chat_template \(.*chat\.jinja, before none\)"):
        finish(tmp_path / "out", inputs={"chat_template": template})
    assert finish(tmp_path / "with", inputs={"chat_template": template})
    with pytest.raises(InputError, match=r"chat_template \(.*chat\.jinja, now none\)"):
        finish(tmp_path / "with")
