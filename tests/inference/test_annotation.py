"""Annotation: the same rewards however the work is cut up, nothing scored twice, bad input refused before a model loads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from annotate_data.work import Responses, Scores
from tests.environments import made_for
from tests.inference.annotation_task import (
    CHAT_TEMPLATE,
    GOOD,
    command,
    environment,
    generated,
    make_models,
    read,
    rewards_in,
    run,
    write,
)
from tests.programs import ROOT, begin, run_program

REWARDS, LOGPS = "get_rewards.py", "get_logps.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def annotated(models, tmp_path_factory):
    """Input, output and log of one plain run over 23 prompts."""
    folder = tmp_path_factory.mktemp("annotated")
    source = write(folder / "in.jsonl", generated(23))
    log = run(
        REWARDS,
        dataset_name_or_path=source,
        output_dir=folder / "out.jsonl",
        reward_name_or_path=models / "rm",
    )
    return source, folder / "out.jsonl", log


def test_the_output_is_the_input_in_order_with_ids_and_rewards(annotated):
    source, output, _ = annotated
    for before, made in zip(read(source), read(output), strict=True):
        assert before == {key: value for key, value in made.items() if key not in ("id", "rewards")}
        assert len(made["rewards"]) == len(before["responses"])
    assert len(set(rewards_in(output))) > 60
    assert len({record["id"] for record in read(output)}) == 23


@pytest.mark.parametrize("program", [REWARDS, LOGPS])
def test_a_chat_template_that_has_changed_is_another_task(models, tmp_path, program):
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    model = {"reward_name_or_path": models / "rm"} if program == REWARDS else {"models": f"policy={models / 'lm'}"}
    flags = {"dataset_name_or_path": write(tmp_path / "in.jsonl", generated(2)), "output_dir": tmp_path / "out.jsonl"}
    run(program, chat_template=template, **flags, **model)
    template.write_text(CHAT_TEMPLATE.replace("im_start", "im_end", 1))
    log = run(program, code=2, chat_template=template, **flags, **model)
    assert f"finished, of another task: chat_template: the content of {template} has changed" in log


def test_rewards_are_those_of_the_model_called_on_each_conversation_alone(annotated, models):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(models / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(models / "rm")
    for record in read(annotated[1])[:6]:
        for response, reward in zip(record["responses"], record["rewards"], strict=True):
            messages = [*record["prompt"], {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                assert model(ids).logits.item() == pytest.approx(reward, abs=1e-5)


def test_the_responses_of_a_record_share_their_prompt_but_for_those_that_lost_its_beginning(models, tmp_path):
    import torch

    from annotate_data.bradley_terry import BradleyTerry
    from baton.models.loading import Settings

    prompt, responses = "why? " * 40, ["a", "bc", "d" * 150, "e" * 203]
    source = write(tmp_path / "in.jsonl", [{"prompt": prompt, "responses": responses}])
    tasks = list(Scores(tmp_path / "out.jsonl", Responses(str(source)), ["rm"]).tasks("rm"))
    for longest, letters in ((512, 1 + 2 + 150 + 203), (300, 1 + 2 + 2 * 300)):  # a token is a letter; two do not fit into 300
        scorer = BradleyTerry(str(models / "rm"), torch.device("cpu"), Settings(max_length=longest))
        read = []
        scorer.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids, read=read: read.append(ids[0].numel()))
        assert sorted(score.index for score in scorer(tasks)) == [0, 1, 2, 3]
        assert 0 <= sum(read) - len(prompt) - letters < 60  # the template's


def test_records_are_assigned_so_that_processes_have_about_as_much_text(tmp_path, monkeypatch):
    records = [{"prompt": "Why?", "responses": ["x" * (1000 if n % 4 == 0 else 10)] * 2} for n in range(40)]
    responses = Responses(str(write(tmp_path / "in.jsonl", records)))
    scores = Scores(tmp_path / "out.jsonl", responses, ["a"])
    shares = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    for process in range(4):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", str(process))
        shares.append(list(scores.tasks("a")))
    assert sorted(task.position for share in shares for task in share) == list(range(40))
    text = [sum(len(response) for task in share for response in task.responses) for share in shares]
    assert max(text) - min(text) <= 2 * 1000


@pytest.mark.parametrize(("processes", "tokens"), [(2, 2048), (1, 1), (1, 100_000)])
def test_rewards_depend_on_neither_processes_nor_batches(annotated, models, tmp_path, processes, tokens):
    source, output, _ = annotated
    log = run(
        REWARDS, processes, dataset_name_or_path=source, output_dir=tmp_path / "out.jsonl",
        reward_name_or_path=models / "rm", tokens_per_batch=tokens,
    )  # fmt: skip
    assert f"processes={processes}" in log
    assert rewards_in(tmp_path / "out.jsonl") == pytest.approx(rewards_in(output), abs=1e-5)
    assert [record["id"] for record in read(tmp_path / "out.jsonl")] == [record["id"] for record in read(output)]


def test_more_processes_than_records(models, tmp_path):
    source = write(tmp_path / "in.jsonl", generated(1))
    run(
        REWARDS,
        2,
        dataset_name_or_path=source,
        output_dir=tmp_path / "out.jsonl",
        reward_name_or_path=models / "rm",
    )
    assert len(read(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(("program", "first", "second"), [(REWARDS, 2, 1), (REWARDS, 1, 2), (LOGPS, 2, 1)])
def test_killed_and_gone_on_with_other_processes_finished_scores_stay_as_they_are(models, tmp_path, program, first, second):
    source, output = write(tmp_path / "in.jsonl", generated(100)), tmp_path / "out.jsonl"
    model = {"reward_name_or_path": models / "rm"} if program == REWARDS else {"models": f"policy={models / 'lm'}"}
    values = {"dataset_name_or_path": source, "output_dir": output, "tokens_per_batch": 1, **model}
    parts = [tmp_path / f"out.jsonl.partial{process or ''}" for process in range(first)]
    processes = begin(first, tmp_path, *command(program, **values)[1:], **environment())
    kill_when(processes, lambda: all(part.exists() and part.stat().st_size > 2000 for part in parts))
    assert not output.exists()
    finished = {place: kept["score"] for part in parts for place, kept in whole_lines(part)}
    assert 0 < len(finished) < 300
    # A score that no model gives shows whether it is computed again
    place = next(iter(finished))
    lines = parts[0].read_bytes()
    parts[0].write_bytes(lines.replace(b"%r" % finished[place], b"1234.5", 1))
    finished[place] = 1234.5

    log = run(program, second, **values)
    assert f"{len(finished)} of 300 scores are done already" in log
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["scored_by_this_run"] == 300 - len(finished)
    made = read(output)
    assert [record["source"]["number"] for record in made] == list(range(100))
    scores = [score for record in made for score in (record["rewards"] if program == REWARDS else record["logps_by"]["policy"])]
    assert {place: scores[place] for place in finished} == finished
    assert not list(tmp_path.glob("*.partial*"))


def kill_when(processes, ready):
    """Kill processes once `ready()`."""
    while not ready():
        for process in processes:
            process.join(0.02)
            assert process.exitcode is None, f"the first run ended before it could be killed, with exit code {process.exitcode}"
    for process in processes:
        process.kill()
        process.join()


def whole_lines(part):
    """The [place, score] lines of a part file, without one that a killed process half wrote."""
    return [json.loads(line) for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"]\n")]


def test_a_second_run_is_up_to_date_at_once(annotated, models):
    source, output, _ = annotated
    before = output.read_bytes()
    log = run(REWARDS, dataset_name_or_path=source, output_dir=output, reward_name_or_path=models / "rm")
    assert "up to date" in log
    assert "runs on" not in log
    assert output.read_bytes() == before


def test_long_conversations_lose_their_beginning_and_are_named(models, tmp_path):
    records = [
        {"prompt": "word " * 200, "responses": ["Good.", "Bad."]},
        {"prompt": "Hi", "responses": ["Good.", "Bad."]},
    ]
    source = write(tmp_path / "in.jsonl", records)
    log = run(
        REWARDS,
        dataset_name_or_path=source,
        output_dir=tmp_path / "out.jsonl",
        reward_name_or_path=models / "rm",
        max_length=64,
    )
    long, _ = read(tmp_path / "out.jsonl")
    assert "2 responses truncated" in log
    assert long["id"] in log
    (noted,) = json.loads((tmp_path / "out.jsonl.summary.json").read_text())["noted"].values()
    assert noted == {"responses": 2, "prompts": [long["id"]]}


def test_the_summary_says_what_the_rewards_look_like(annotated):
    import numpy as np

    _, output, _ = annotated
    summary = json.loads(Path(f"{output}.summary.json").read_text())["rewards"]
    rewards = np.array([record["rewards"] for record in read(output)])
    lengths = np.array([[len(response) for response in record["responses"]] for record in read(output)])
    assert summary["mean"] == pytest.approx(rewards.mean())
    assert summary["best_of_K_mean"] == pytest.approx(rewards.max(1).mean())
    assert summary["spread_within_prompts"] == pytest.approx(rewards.std(1).mean())
    assert summary["correlation_with_length"] == pytest.approx(np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1])
    assert summary["share_of_ties"] == 0


def test_log_probabilities_are_those_of_the_model(models, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models / "lm")
    records = generated(7)
    for record in records[:3]:  # as sampled: the end of turn where the policy stopped, none where it was cut off
        ids = [tokenizer(text)["input_ids"] for text in record["responses"]]
        record["response_token_ids"] = [ids[0] + [2], ids[1], ids[2] + [2]]
        record["finish_reasons"] = ["stop", "length", "stop"]
    source, output = write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    values = {
        "dataset_name_or_path": source,
        "models": [f"policy={models / 'lm'}", f"initial={models / 'lm2'}"],
    }
    run(LOGPS, output_dir=output, **values)
    made = read(output)
    for name, path in (("policy", "lm"), ("initial", "lm2")):
        model = AutoModelForCausalLM.from_pretrained(models / path).eval()
        for record in made:
            assert record["source"] == records[made.index(record)]["source"]
            for k, response in enumerate(record["responses"]):
                prompt = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, return_dict=False)
                ids = record.get("response_token_ids", [None] * 3)[k] or [
                    *tokenizer(response)["input_ids"],
                    2,
                ]
                with torch.no_grad():
                    logps = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
                expected = sum(logps[len(prompt) + t - 1, token].item() for t, token in enumerate(ids))
                assert record["logps_by"][name][k] == pytest.approx(expected, abs=1e-3)
    run(LOGPS, 2, output_dir=tmp_path / "two.jsonl", tokens_per_batch=3000, **values)
    for one, two in zip(made, read(tmp_path / "two.jsonl"), strict=True):
        for name in ("policy", "initial"):
            assert one["logps_by"][name] == pytest.approx(two["logps_by"][name], abs=1e-4)


def test_a_model_that_cannot_take_packed_trees_gives_the_same_log_probabilities(models, tmp_path):
    shutil.copytree(models / "lm", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"attention_chunk_size": 512}))
    names = {"packed": models / "lm", "alone": tmp_path / "other"}
    log = run(
        LOGPS,
        dataset_name_or_path=write(tmp_path / "in.jsonl", generated(5)),
        output_dir=tmp_path / "out.jsonl",
        models=[f"{name}={path}" for name, path in names.items()],
    )
    assert ("attention=shared_prefix" in log, "attention=blockwise_causal" in log) == (True, True)
    for record in read(tmp_path / "out.jsonl"):
        assert record["logps_by"]["packed"] == pytest.approx(record["logps_by"]["alone"], abs=1e-3)


LOGPS_OF_TWO = {**GOOD, "response_token_ids": [[1, 2], [3]], "response_logps": [[-0.5, -1], [-2.5]]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no records"),
        (
            [json.dumps(LOGPS_OF_TWO), json.dumps({**LOGPS_OF_TWO, "response_token_ids": None})],
            "in.jsonl:2: `response_logps` belong to `response_token_ids`",
        ),
        ([json.dumps({**LOGPS_OF_TWO, "response_logps": [[-1, -1]]})], "in.jsonl:1: `response_logps` must hold one entry"),
        (
            [json.dumps({**LOGPS_OF_TWO, "response_logps": [[-1, -1], [-1, -1]]})],
            "in.jsonl:1: `response_logps` of response 2 must be a list of 1 numbers",
        ),
        (
            [json.dumps({**LOGPS_OF_TWO, "response_logps": [[-1, None], [-1]]})],
            "in.jsonl:1: `response_logps` of response 1 must hold finite numbers, got [-1, None]",
        ),
        ([json.dumps(GOOD), "{not json"], "in.jsonl:2: not JSON"),
        ([json.dumps({"prompt": "Hello"})], "in.jsonl:1: `responses` must be a list"),
        ([json.dumps({"responses": ["a"]})], "in.jsonl:1: the record has no `prompt`"),
        (
            [json.dumps(GOOD), json.dumps({**GOOD, "responses": ["a"]})],
            "in.jsonl:2: 1 `responses`, but --K 2",
        ),
        (
            [json.dumps({**GOOD, "finish_reasons": ["stop"]})],
            "in.jsonl:1: `finish_reasons` must hold one entry",
        ),
    ],
)
def test_bad_records_are_refused_by_line(models, tmp_path, lines, message):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    values = {
        "dataset_name_or_path": source,
        "output_dir": tmp_path / "o.jsonl",
        "reward_name_or_path": models / "rm",
        "K": 2,
    }
    log = run(REWARDS, code=2, **values)
    assert message in log
    assert "runs on" not in log and "Traceback" not in log
    assert not (tmp_path / "o.jsonl").exists()


def test_bad_arguments_are_refused(models, tmp_path):
    source = write(tmp_path / "in.jsonl", [GOOD])
    good = {
        "dataset_name_or_path": source,
        "output_dir": tmp_path / "o.jsonl",
        "reward_name_or_path": models / "rm",
    }
    for changes, message in [
        ({"reward_name_or_path": tmp_path / "nothing"}, "nothing: no such folder"),
        ({"reward_name_or_path": models / "lm"}, "not a Bradley-Terry reward model"),
        ({"output_dir": tmp_path}, "is a folder"),
        ({"dataset_name_or_path": tmp_path / "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"tokens_per_bach": 10}, "did you mean `tokens_per_batch`?"),
        ({"K": 0}, "`K`"),
        ({"chat_template": tmp_path / "absent.jinja"}, "absent.jinja"),
    ]:
        log = run(REWARDS, code=2, **{**good, **changes})
        assert message in log
        assert "runs on" not in log and "Traceback" not in log
    assert not list(tmp_path.glob("o.jsonl"))


def test_a_reward_model_without_chat_template_says_how_to_give_one(models, tmp_path):
    plain = shutil.copytree(models / "rm", tmp_path / "rm")
    for file in plain.glob("chat_template*"):
        file.unlink()
    source = write(tmp_path / "in.jsonl", [GOOD])
    values = {
        "dataset_name_or_path": source,
        "output_dir": tmp_path / "o.jsonl",
        "reward_name_or_path": plain,
    }
    log = run(REWARDS, code=2, **values)
    assert "give one as a Jinja file with --chat_template" in log
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    run(REWARDS, chat_template=tmp_path / "t.jinja", **values)


def test_a_launcher_that_starts_fewer_processes_than_told_is_an_error(models, tmp_path):
    source = write(tmp_path / "in.jsonl", [GOOD])
    values = {"dataset_name_or_path": source, "output_dir": tmp_path / "o.jsonl", "reward_name_or_path": models / "rm"}
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    words = [sys.executable, *launcher, *command(REWARDS, **values)[1:]]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "told to start 2 processes but started 1" in done.stderr


def test_a_reward_that_is_not_a_number_names_the_prompt(models, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(models / "rm")
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(models / "rm").save_pretrained(tmp_path / "rm")
    source = write(tmp_path / "in.jsonl", [{**GOOD, "id": "the-id"}])
    log = run(
        REWARDS,
        code=2,
        dataset_name_or_path=source,
        output_dir=tmp_path / "o.jsonl",
        reward_name_or_path=tmp_path / "rm",
    )
    assert "prompt the-id: bt gave nan" in log


def values_of(program, models, folder, records):
    """The arguments of a scoring of `records`."""
    given = {"models": [f"policy={models / 'lm'}"]} if program == LOGPS else {"reward_name_or_path": models / "rm"}
    return {"dataset_name_or_path": write(folder / "in.jsonl", records), "output_dir": folder / "o.jsonl", **given}


def said_by_two_processes(program, **values):
    """All output of a program under a bare `accelerate launch` of two processes on the CPU, in which it must fail."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/ddp.yaml", "--num_processes", "2"]
    words = [sys.executable, *launcher, *command(program, **values)[1:]]
    variables = environment() | {"ACCELERATE_USE_CPU": "true"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=ROOT, env=variables, timeout=300, **output)
    assert done.returncode != 0
    assert done.stdout.count("Traceback") == 1 and "interrupted" not in done.stdout, done.stdout  # the launcher's own
    return done.stdout


@pytest.mark.parametrize("program", [REWARDS, LOGPS])
def test_of_two_processes_one_names_a_bad_record_and_does_it_last(models, tmp_path, program):
    output = said_by_two_processes(program, **values_of(program, models, tmp_path, [GOOD, {"prompt": "Hello"}]))
    assert output.count("in.jsonl:2: ") == 1 and "in.jsonl:2: " in output.rstrip("=\n").splitlines()[-1], output


def test_of_two_processes_one_says_what_its_model_lacks_and_does_it_last(models, tmp_path):
    plain = shutil.copytree(models / "rm", tmp_path / "rm")
    for file in plain.glob("chat_template*"):
        file.unlink()
    values = values_of(REWARDS, models, tmp_path, [GOOD, GOOD]) | {"reward_name_or_path": plain}
    output, message = said_by_two_processes(REWARDS, **values), "give one as a Jinja file with --chat_template"
    assert output.count(message) == 1 and message in output.rstrip("=\n").splitlines()[-1], output


LAUNCHED = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.parametrize("program", [REWARDS, LOGPS])
def test_more_processes_than_gpus_are_refused_before_anything_is_read(models, tmp_path, program):
    words = command(program, **values_of(program, models, tmp_path, [{"prompt": "Hello"}]))[1:]
    done = run_program(*words, env=environment() | LAUNCHED | {"BATON_ENVS": str(made_for("cuda", tmp_path / "envs"))})
    assert done.returncode == 2
    assert "`num_processes`: 2 processes on this machine, but 1 GPUs" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_scorer_that_needs_no_gpu_may_have_more_processes_than_gpus(models, tmp_path):
    values = {"dataset_name_or_path": write(tmp_path / "in.jsonl", [{"prompt": "Hello"}]), "output_dir": tmp_path / "o.jsonl"}
    words = command(REWARDS, scorer="function:docs/examples/gsm8k_reward.py:gsm8k_reward", **values)[1:]
    done = run_program(*words, env=environment() | LAUNCHED | {"BATON_ENVS": str(made_for("cuda", tmp_path / "envs"))})
    assert done.returncode == 2 and "in.jsonl:1: " in done.stderr and "num_processes" not in done.stderr
