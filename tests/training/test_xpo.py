"""XPO: pairs of a response of the policy and one of the reference, and the loss of the paper on them."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton import jsonl
from baton.drops import Drops
from baton.errors import InputError
from baton.pairs import PairSettings
from baton.records import prompt_hash, prompt_of
from dpo_iteration.choose import choose_pairs, write_pairs
from dpo_iteration.losses import LossNumbers
from dpo_iteration.own_losses import optimism
from dpo_iteration.xpo import COLUMN, CUT_OFF, NO_REFERENCE, SIDE, pairs_of_each, reference_is_chosen
from tests.models.tiny_models import model_of, one_thread, random_pairs
from tests.programs import read_jsonl, run_program, write_jsonl
from tests.training.test_dpo_core import loss_and_gradients, tokenizer, trainer_of, with_reference
from tests.training.test_preference_losses import BETA, some_pairs

__all__ = ["one_thread", "tokenizer"]  # fixtures

ALPHA = 0.02

# The loss


@pytest.fixture(scope="module")
def data():
    """A model, and rows whose reference log-probabilities are some nats away; of half of them chosen is the reference's."""
    model = model_of("llama")
    rows = with_reference(random_pairs(6), model)
    return model, [{**row, COLUMN: number % 2 == 0} for number, row in enumerate(rows)]


def test_the_term_and_its_gradient_are_those_of_the_formula():
    torch.manual_seed(1)
    logps = [(-torch.rand(64) * 90).requires_grad_() for _ in range(2)]  # of chosen and rejected, summed
    lengths = [torch.randint(1, 60, (64,)) for _ in range(2)]
    means = [sums / count for sums, count in zip(logps, lengths, strict=True)]
    pairs = some_pairs()._replace(
        chosen_mean=means[0], rejected_mean=means[1], chosen_length=lengths[0], rejected_length=lengths[1]
    )
    of_chosen = torch.rand(64) < 0.5
    term = optimism(pairs, of_chosen, ALPHA)
    torch.testing.assert_close(term, ALPHA * torch.where(of_chosen, *logps), rtol=1e-6, atol=0)
    term.sum().backward()
    for sums, chosen in zip(logps, (of_chosen, ~of_chosen), strict=True):
        torch.testing.assert_close(sums.grad, ALPHA * chosen.float(), rtol=1e-6, atol=1e-9)


def of_paper(model, rows) -> torch.Tensor:
    """Algorithm 1's objective, a mean over pairs, from the model's own logits of each sequence."""

    def logp(prompt, response):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(response)), response].sum()

    losses = []
    for row in rows:
        chosen, rejected = (logp(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))
        of_reference = chosen if row[COLUMN] else rejected
        ratios = chosen - row["ref_chosen_logps"] - rejected + row["ref_rejected_logps"]
        losses.append(ALPHA * of_reference - torch.log(torch.sigmoid(BETA * ratios)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradients_are_those_of_the_paper_on_packed_rows_and_in_trls_own_forward_pass(
    packed, data, tokenizer, tmp_path
):
    model, rows = data
    numbers = LossNumbers(xpo_alpha=ALPHA)
    trainer = trainer_of(model, rows, tokenizer, tmp_path, packed, tokens_per_row=70, numbers=numbers)
    loss, gradients, metrics = loss_and_gradients(trainer, rows)
    trainer.model.zero_grad()
    wanted = of_paper(trainer.model, rows)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=2e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    plain, _, of_trl = loss_and_gradients(trainer_of(model, rows, tokenizer, tmp_path, packed), rows)
    assert metrics.pop("loss/xpo") == pytest.approx(loss - plain, rel=1e-3) and metrics == pytest.approx(of_trl)


def test_a_step_in_rows_has_the_loss_of_the_whole_batch_and_an_evaluation_is_without_the_term(data, tokenizer, tmp_path):
    model, rows = data
    steps = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 6}
    trainer = trainer_of(model, rows, tokenizer, tmp_path, tokens_per_row=70, numbers=LossNumbers(xpo_alpha=ALPHA), **steps)
    trainer.train()
    (line,) = (line for line in trainer.state.log_history if "loss" in line)
    assert line["loss"] == pytest.approx(of_paper(model, rows).item(), rel=1e-4) and line["loss/xpo"] < 0
    unknown = [{**row, COLUMN: None} for row in rows]
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(unknown))
        plain = trainer_of(trainer.model.eval(), rows, tokenizer, tmp_path)
        wanted = plain.compute_loss(plain.model.eval(), plain.data_collator(rows))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": ["ipo"]}, "xpo_alpha needs loss_type sigmoid"),
        ({"f_divergence_type": "forward_kl"}, "xpo_alpha needs f_divergence_type reverse_kl"),
        ({"use_weighting": True}, "`xpo_alpha` adds what counts alike for all pairs"),
        ({"sync_ref_model": True, "packed": False}, "`xpo_alpha` reads the reference's log-probabilities once"),
        ({"side": False}, "xpo_alpha needs `reference_is_chosen` in every row"),
    ],
)
def test_what_the_term_does_not_go_with_is_refused(config, message, data, tokenizer, tmp_path):
    model, rows = data
    if not config.pop("side", True):
        rows = [{name: row[name] for name in row if name != COLUMN} for row in rows]
    with pytest.raises(InputError, match=message):
        trainer_of(model, rows, tokenizer, tmp_path, numbers=LossNumbers(xpo_alpha=ALPHA), **config)


# The pairs


@st.composite
def annotated_responses(draw, name):
    """Responses whose texts begin with `name`, some cut off by length, with rewards that are seldom equal."""
    K = draw(st.integers(1, 5))
    return {
        "responses": [f"{name} {draw(st.integers(0, 9))}" for _ in range(K)],
        "response_token_ids": [[number] for number in range(K)],
        "finish_reasons": [draw(st.sampled_from(["stop", "stop", "length"])) for _ in range(K)],
        "rewards": [draw(st.integers(0, 99)) / 9 for _ in range(K)],
        "response_logps": [[-1.0]] * K,
    }


@given(
    st.lists(st.tuples(annotated_responses("own"), st.none() | annotated_responses("other")), min_size=1, max_size=4),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_pair_is_one_response_of_each_and_says_which_and_every_prompt_is_accounted_for(prompts, most, drop_truncated):
    records = [{"id": str(n), "prompt": f"Film {n}?", "source": "a test", **own} for n, (own, _) in enumerate(prompts)]
    extra = {str(n): other for n, (_, other) in enumerate(prompts) if other}
    settings = PairSettings("random", pairs_per_prompt=most, drop_truncated=drop_truncated, seed=3)
    drops, counted = Drops(quiet=True), Counter()
    numbered = [(f"file:{n}", record) for n, record in enumerate(records)]
    pairs = list(choose_pairs(numbered, settings, drops, counted, extra=extra, pair_up=pairs_of_each))
    assert len(pairs) + drops.counts.total() == counted["in"] and drops.counts[NO_REFERENCE] == len(prompts) - len(extra)
    for pair in pairs:
        sides = [pair[side].split()[0] for side in ("chosen", "rejected")]
        assert sorted(sides) == ["other", "own"] and pair[pair[SIDE]].startswith("other")
        assert pair["margin"] == pair["chosen_reward"] - pair["rejected_reward"] > 0 and pair["source"] == "a test"
        assert not drop_truncated or pair["chosen_finish_reason"] == pair["rejected_finish_reason"] == "stop"
        place = pair[f"{pair[SIDE]}_token_ids"][0]
        assert extra[pair["id"]]["responses"][place] == pair[pair[SIDE]] and "response_logps" not in pair
    for n, (own, other) in enumerate(prompts):
        left = [
            [reason for reason in each["finish_reasons"] if not (drop_truncated and reason == "length")]
            for each in (own, other or own)
        ]
        asked = min(most, *map(len, left)) if other else 1
        if other and asked == 0:
            assert str(n) in drops.names[CUT_OFF]
    assert counted["in"] == sum(
        max(1, min(most, *(sum(not (drop_truncated and r == "length") for r in e["finish_reasons"]) for e in (own, other))))
        if other else 1
        for own, other in prompts
    )  # fmt: skip


def test_extra_responses_to_none_of_the_prompts_are_refused(tmp_path):
    record = {"prompt": "Film?", "responses": ["own"], "rewards": [1.0]}
    with pytest.raises(InputError, match="no prompt is one of the data's"):
        write_pairs(
            tmp_path / "pairs.jsonl", [("file:1", record)], "file", PairSettings("random"), extra={}, pair_up=pairs_of_each
        )


def test_which_responses_meet_depends_on_seed_and_prompt_alone():
    own = {"responses": list("abcdefgh"), "rewards": list(range(8))}
    other = {"responses": list("ijklmnop"), "rewards": list(range(10, 18))}
    records = [(str(n), {"id": str(n), "prompt": f"Film {n}?", **own}) for n in range(9)]
    extra = {str(n): other for n in range(9)}

    def chosen(records, seed):
        pairs = pairs_of_each(records, PairSettings("random", seed=seed), Drops(), extra)
        return {pair["id"]: (pair["chosen"], pair["rejected"]) for pair in pairs}

    first = chosen(records, 1)
    assert first == chosen(records[::-1], 1) != chosen(records, 2)
    assert len(set(first.values())) > 4


def test_extra_responses_to_another_prompt_under_the_same_id_are_refused_here_too():
    own = {"id": "1", "prompt": "Hello", "responses": ["a"], "rewards": [1.0]}
    other = {"responses": ["b"], "rewards": [0.0], "prompt_hash": prompt_hash(prompt_of({"prompt": "Goodbye"}, "here"))}
    with pytest.raises(InputError, match="here: `extra_responses` has another prompt under this `id`"):
        list(pairs_of_each([("here", own)], PairSettings("random"), Drops(), {"1": other}))


@pytest.mark.parametrize(("side", "is_chosen"), [("chosen", True), ("rejected", False), (None, None)])
def test_a_pair_says_the_side_of_the_reference(side, is_chosen):
    assert reference_is_chosen({SIDE: side} if side else {}, "here") is is_chosen
    with pytest.raises(InputError, match=r"here: `reference_side` names the side .*; got 'both'"):
        reference_is_chosen({SIDE: "both"}, "here")


# The program


@pytest.fixture(scope="module")
def references(annotated, tmp_path_factory):
    """Annotated responses of the reference to 40 of the 48 prompts."""
    responses = ["It is a film.", "There is a plot."]
    records = [{"prompt": record["prompt"], "responses": responses, "rewards": [0.5, 0.4]} for record in read_jsonl(annotated)]
    return write_jsonl(tmp_path_factory.mktemp("xpo") / "reference.jsonl", records[:40])


def xpo(task, data, output, *more):
    return run_program(
        "dpo_iteration/run_dpo.py", "--model_name_or_path", task / "base", "--dataset_name_or_path", data,
        "--output_dir", output, "--max_length", 128, "--max_prompt_length", 64, "--use_cpu", "true", "--bf16", "false",
        "--gradient_checkpointing", "false", "--per_device_train_batch_size", 8, "--logging_steps", 1, "--max_steps", 2,
        "--learning_rate", 1e-3, "--xpo_alpha", 1e-2, *more,
    )  # fmt: skip


def test_a_run_pairs_policy_with_reference_and_its_pairs_are_read_back_with_their_sides(task, annotated, references, tmp_path):
    words = ["--extra_responses", references, "--choose_type", "random"]
    alone = [
        {"prompt": each["prompt"], **{name: each[name][:1] for name in ("responses", "rewards")}}
        for each in read_jsonl(annotated)
    ]
    done = xpo(task, write_jsonl(tmp_path / "alone.jsonl", alone), tmp_path / "policy", *words, "--eval_every", 12)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "policy.manifest.json").read_text())
    pairs = read_jsonl(tmp_path / "policy.pairs.jsonl")
    assert all((pair[pair[SIDE]] in ("It is a film.", "There is a plot.")) for pair in pairs)
    assert {pair[SIDE] for pair in pairs} == {"chosen", "rejected"}
    counts, without = manifest["counts"], 8 - 1  # the 48th prompt is held out
    assert counts["dropped"].pop("no response of the reference") == without
    assert counts["in"] == 44 == counts["out"] + without + sum(counts["dropped"].values())
    assert manifest["held_out"]["dropped"]["no response of the reference"] == 1 and manifest["held_out"]["pairs"] > 0
    assert manifest["held_out"]["pairs"] + sum(manifest["held_out"]["dropped"].values()) == 4
    assert "eval_loss/xpo" not in manifest["metrics"]
    lines = read_jsonl(tmp_path / "policy.metrics.jsonl")
    assert all(line["loss/xpo"] < 0 for line in lines if "loss" in line)
    again = choose_pairs(jsonl.read(tmp_path / "policy.pairs.jsonl"), PairSettings(), Drops(), Counter())
    assert list(again) == pairs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--extra_responses"], "and `choose_type` max_min others: set `choose_type: random`"),
        ([], "`xpo_alpha` needs the side of the reference's response, and 48 of 48 pairs have no `reference_side`"),
        (["--loss_type", "ipo"], "xpo_alpha needs loss_type sigmoid"),
    ],
)
def test_what_cannot_be_xpo_is_one_message(task, annotated, references, tmp_path, words, message):
    words = [*words, references] if words == ["--extra_responses"] else words
    done = xpo(task, annotated, tmp_path / "policy", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
