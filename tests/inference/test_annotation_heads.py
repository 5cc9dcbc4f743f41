"""Reward models with several outputs, and process reward models: what get_rewards.py and serve_rm.py read of them."""

import math

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from annotate_data.bradley_terry import BradleyTerry
from annotate_data.causal_lm import CausalLM
from annotate_data.conversations import REWRITTEN
from annotate_data.process_reward import ProcessReward
from annotate_data.reward_service import started
from annotate_data.serve_rm import application
from annotate_data.work import Task
from baton.errors import InputError
from baton.models.loading import Settings
from baton.models.templates import with_places
from baton.sources import check_process_model, check_reward_model
from tests.inference.annotation_task import make_models, read, run, write

CPU = torch.device("cpu")
PROMPT = [{"role": "user", "content": "Why?"}]
RESPONSES = [
    "First.\n\nThen so.\n\nAt last.",
    "First.\n\nThen so.",
    "One step",
    "First.\n\nThen so.\n\nAt last.\n\n\n\n",
    " \n\n ",
]
WEIGHTS = {"helpful": 0.5, "brief": -2.0, "clear": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with `several`, of three outputs, and `steps`, a process reward model."""
    folder = make_models(tmp_path_factory.mktemp("models"))
    for name, outputs in {"several": list(WEIGHTS), "steps": ["step"]}.items():
        torch.manual_seed(5)
        named = {"id2label": dict(enumerate(outputs)), "label2id": {output: i for i, output in enumerate(outputs)}}
        model = AutoModelForSequenceClassification.from_pretrained(folder / "lm", dtype="float32", **named)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "lm").save_pretrained(folder / name)
    return folder


def tasks(responses, count=2):
    """Tasks of the same responses to several prompts."""
    prompts = [[{"role": "user", "content": f"Why {number}? " * (number + 1)}] for number in range(count)]
    return [
        Task(number, f"f:{number + 1}", {"id": str(number)}, prompt, responses, list(range(len(responses))))
        for number, prompt in enumerate(prompts)
    ]


def scored(scorer, responses):
    return {(score.task.position, score.index): score for score in scorer(tasks(responses))}


@pytest.mark.parametrize("packed", [True, False])
def test_a_reward_is_the_weighted_sum_of_the_outputs_that_are_named(models, packed):
    scorer = BradleyTerry(str(models / "several"), CPU, Settings(heads=("helpful=0.5", "brief=-2")))
    scorer.packing.holds = packed
    if not packed:
        scorer.model.set_attn_implementation(scorer.packing.own)
    plain = AutoModelForSequenceClassification.from_pretrained(models / "several")
    tokenizer = AutoTokenizer.from_pretrained(models / "lm")
    found = scored(scorer, RESPONSES)
    for task in tasks(RESPONSES):
        for index, response in enumerate(RESPONSES):
            conversation = [*task.prompt, {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
            with torch.no_grad():
                outputs = plain(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0].tolist()
            wanted = sum(weight * output for weight, output in zip(WEIGHTS.values(), outputs, strict=True))
            assert found[task.position, index].value == pytest.approx(wanted, abs=1e-4)


def probabilities_alone(folder, task, response):
    """The probability of each step, of a forward pass that ends with it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "lm")
    model, found = AutoModelForSequenceClassification.from_pretrained(folder / "steps"), []
    for end in [at for at in range(1, len(response) + 1) if response[at:].startswith("\n\n") or at == len(response)]:
        if response[:end].strip() and not response[:end].endswith("\n"):
            ids, (place,) = with_places(tokenizer, task.prompt, response, [end], "here")
            with torch.no_grad():
                found.append(model(torch.tensor([ids[: place + 1]])).logits[0, 0].sigmoid().item())
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_a_process_reward_is_made_of_the_probabilities_of_steps_each_read_at_its_end(models, packed):
    scorer = ProcessReward(str(models / "steps"), CPU, Settings())
    scorer.packing.holds = packed
    if not packed:
        scorer.model.set_attn_implementation(scorer.packing.own)
    for how in ("min", "mean", "last", "product"):
        scorer.how = how
        found = scored(scorer, RESPONSES)
        for task in tasks(RESPONSES):
            assert found[task.position, 4].value is None and "without a step" in found[task.position, 4].note
            for index, response in enumerate(RESPONSES[:4]):
                steps = probabilities_alone(models, task, response)
                assert len(steps) == (3, 2, 1, 3)[index]
                made = {"min": min(steps), "mean": sum(steps) / len(steps), "last": steps[-1], "product": math.prod(steps)}
                assert found[task.position, index].value == pytest.approx(made[how], abs=1e-5)


def test_steps_before_the_longest_input_are_left_out_and_that_is_noted(models):
    scorer = ProcessReward(str(models / "steps"), CPU, Settings(max_length=20, step_reward="last"))
    scores = scored(scorer, [f"{'Long step. ' * 4}\n\nLast one", "Short"])
    assert "truncated" in scores[0, 0].note and 0 < scores[0, 0].value < 1


def test_a_separator_may_be_written_with_a_backslash(models):
    scorer = ProcessReward(str(models / "steps"), CPU, Settings(step_separator="\\n", step_reward="product"))
    assert len(scorer.steps(tasks(["a\nb\nc"])[0], 0).places) == 3


STRIPS_THOUGHTS = (
    "{% for m in messages %}{% if 'no!' in m['content'] %}{{ raise_exception('no') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}{{ ' after thinking' if '</think>' in m['content'] }}\n"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(("scorer", "name"), [(ProcessReward, "steps"), (CausalLM, "lm")])
def test_a_response_that_the_template_changes_has_no_score_and_one_that_it_refuses_is_an_error(models, tmp_path, scorer, name):
    (tmp_path / "strips.jinja").write_text(STRIPS_THOUGHTS)
    made = scorer(str(models / name), CPU, Settings(chat_template=str(tmp_path / "strips.jinja")))
    scores = scored(made, ["<think>So.</think>One.\n\nTwo.", "One.\n\nTwo."])
    assert (scores[0, 0].value, scores[0, 0].note, scores[0, 0].again) == (None, REWRITTEN, False)
    assert math.isfinite(scores[0, 1].value)
    with pytest.raises(InputError, match="f:1: the chat template cannot take this conversation"):
        scored(made, ["no!"])


def test_both_score_at_once_and_serve_rm_serves_them(models, tmp_path):
    words = [f"bt:{models / 'several'}", f"process:{models / 'steps'}"]
    source, output = write(tmp_path / "in.jsonl", [{"prompt": "Why?", "responses": RESPONSES[:4]}]), tmp_path / "out.jsonl"
    run("get_rewards.py", dataset_name_or_path=source, output_dir=output, scorer=words, heads=["brief"], weights=[1, 2])
    (record,) = read(output)
    assert set(record["rewards_by"]) == {"bt", "process"}
    loaded = {
        "bt": ("bt", BradleyTerry(str(models / "several"), CPU, Settings(heads=("brief",)))),
        "process": ("process", ProcessReward(str(models / "steps"), CPU, Settings())),
    }
    app = application(started(loaded), {"bt": 1.0, "process": 2.0}, {"bt", "process"}, None)
    conversations = [[*PROMPT, {"role": "assistant", "content": response}] for response in RESPONSES[:4]]
    answer = TestClient(app).post("/get_reward", json={"messages": conversations}).json()
    assert answer["rewards"] == pytest.approx(record["rewards"], abs=1e-5)
    assert answer["rewards_by"]["process"] == pytest.approx(record["rewards_by"]["process"], abs=1e-5)
    refused = TestClient(app).post("/get_reward", json={"query": ["Why? So."], "prompts": ["Why? "]})
    assert refused.status_code == 422 and "give `messages`" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [
        ("several", None, "has 3 outputs, helpful, brief, clear: say with --heads NAME[=WEIGHT]"),
        ("several", ["kind"], "--heads kind: .* has no output `kind`, it has helpful, brief, clear"),
        ("several", ["brief=much"], "--heads brief=much: the weight must be a number, got 'much'"),
        ("steps", None, "a process reward model, which scores steps: name it process:"),
        ("lm", None, "not a Bradley-Terry reward model"),
    ],
)
def test_a_model_that_gives_no_reward_by_itself_is_refused(models, name, heads, message):
    with pytest.raises(InputError, match=message.replace("[=", r"\[=").replace("T]", r"T\]")):
        check_reward_model(str(models / name), heads, several=True)


@pytest.mark.parametrize(
    ("name", "message"), [("steps", "name it process:"), ("lm", "not a Bradley-Terry"), ("several", "has 3 outputs")]
)
def test_what_only_its_configuration_shows_is_refused_once_it_is_loaded(models, name, message):
    with pytest.raises(InputError, match=message):
        BradleyTerry(str(models / name), CPU, Settings())


def test_several_outputs_are_refused_where_one_alone_is_read_and_rewards_where_steps_are(models):
    check_reward_model(str(models / "rm"), ["brief"], several=True)  # has one output: nothing is to be chosen
    with pytest.raises(InputError, match="with 3 labels"):
        check_reward_model(str(models / "several"))
    for name, count in (("rm", 1), ("several", 3), ("lm", 2)):
        with pytest.raises(InputError, match=f"not a process reward model.* with {count} labels"):
            check_process_model(str(models / name))
    check_process_model(str(models / "steps"))
