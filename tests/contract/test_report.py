"""The report: numbers that mean what they say, nothing invented, one clear message for each bad input."""

import math
import os
import pty
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from baton.arguments import StageArguments, option
from baton.stage import Stage
from generation.arguments import GenerationArguments
from report import metrics, plot, summarize
from report.kl import checked, notes
from report.summarize import evaluated_files

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "round", "gold_mean", "proxy_mean", "win_rate", "win_rate_ci", "length_mean", "kl", "distinct",
}  # fmt: skip

Record = dict

# What get_logps.py notes of such responses: annotate_data/causal_lm.py
RETOKENISED = "tokenised again: no sampled token ids, or ids that this tokenizer does not read as the response"


def record(number: int, round_: int, **changes: object) -> Record:
    """The held-out prompt `number` as the policy of `round_` answered it, twice, better in every round."""
    return {
        "id": f"{number:016x}",
        "prompt": [{"role": "user", "content": f"Film {number}"}],
        "responses": [f"good {number} {round_}", f"fine {number} {round_}"],
        "response_token_ids": [[1, 2, 3], [1, 2, 3, 4, 5]],
        "rewards": [round_ + number / 10, round_ + number / 10 + 0.05],
        "rewards_by": {"gold": [round_ / 2, 0.25]},
        "logps_by": {"policy": [-10.0, -12.0], "initial": [-10.0 - round_, -12.0 - 3 * round_]},
    } | changes


def write_round(run_dir: Path, number: int, records: list[Record]) -> Path:
    path = run_dir / "heldout" / f"round{number}" / "evaluated.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return path


def write_run(run_dir: Path, rounds: int = 3, change: Callable[[Record], Record] = lambda record: record) -> Path:
    for round_ in range(rounds):
        write_round(run_dir, round_, [change(record(number, round_)) for number in range(5)])
    return run_dir


def without(*keys: str) -> Callable[[Record], Record]:
    return lambda record: {key: value for key, value in record.items() if key not in keys}


def report(run_dir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "report/summarize.py", "--run_dir", run_dir, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)


def summary(run_dir: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:  # in this process, which has imported all that the program needs
        patch.setattr(sys, "argv", ["summarize.py", "--run_dir", str(run_dir)])
        summarize.main()
    return orjson.loads((run_dir / "summary.json").read_bytes())


def test_the_summary_holds_every_number_of_every_round(tmp_path):
    rounds = summary(write_run(tmp_path))["rounds"]
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert all(entry.keys() >= KEYS for entry in rounds)
    last = rounds[2]
    assert last["gold_mean"] == pytest.approx((1 + 0.25) / 2)
    assert last["proxy_mean"] == pytest.approx(2 + 0.2 + 0.025)
    assert last["kl"] == pytest.approx((2 + 6) / 2)
    assert last["length_mean"] == 4
    assert last["length_unit"] == "tokens"
    assert last["distinct"] == 1
    # gold [1, 0.25] against [0, 0.25]: the first wins twice, the second once and ties once
    assert last["win_rate"] == pytest.approx((2 + 1.5) / 4)
    assert last["win_rate_by"] == "gold"
    assert (rounds[0]["win_rate"], rounds[0]["win_rate_ci"], rounds[0]["kl"]) == (0.5, [0.5, 0.5], 0)


@pytest.mark.parametrize(
    ("missing", "nulls", "says"),
    [
        (("rewards_by",), {"gold_mean", "gold_mean_ci"}, {"win_rate_by": "proxy", "win_rate": 1.0}),
        (("logps_by",), {"kl", "kl_ci"}, {"win_rate_by": "gold"}),
        (("response_token_ids",), set(), {"length_unit": "words", "length_mean": 3.0}),
        (("rewards_by", "logps_by"), {"gold_mean", "gold_mean_ci", "kl", "kl_ci"}, {"win_rate_by": "proxy"}),
    ],
    ids=["no gold", "no log-probabilities", "no token ids", "neither"],
)
def test_what_was_not_measured_is_null_and_never_invented(tmp_path, missing, nulls, says):
    last = summary(write_run(tmp_path, change=without(*missing)))["rounds"][-1]
    assert {key for key, value in last.items() if value is None} == nulls
    assert {key: last[key] for key in says} == says


def test_a_number_that_one_round_lacks_is_null_in_that_round_alone(tmp_path):
    write_run(tmp_path)
    write_round(tmp_path, 0, [without("logps_by")(record(number, 0)) for number in range(5)])
    assert [entry["kl"] for entry in summary(tmp_path)["rounds"]] == [None, 2, 4]


class Weights(StageArguments):
    weights: list[float] | None = option(None, "of scorers")


def made_by(
    stage: str, output: Path, arguments: StageArguments, inputs: dict[str, Path], settings: dict | None = None, **facts: object
) -> Path:
    """`output` with the manifest that a stage writes."""
    content = output.read_bytes()
    output.unlink()
    begun = Stage.begin(stage, arguments, output, inputs, settings)
    output.write_bytes(content)
    begun.finish(records_in=5, records_out=5, **facts)
    return output


def evaluate(run_dir: Path, number: int, template: str | None = None, noted: dict | None = None, **sampling: object) -> None:
    """A round as the loop leaves it: the policy's log-probabilities are of sampling, the initial model's of get_logps.py."""
    shard = write_round(run_dir, number, [])
    folder = shard.parent
    logps = {"response_logps": [[-3.0, -4.5, -2.5], [-1.0, -2.0, -3.0, -4.0, -2.0]]}  # sums -10 and -12
    records = [record(n, number, **logps, logps_by={"initial": [-10.0 - number, -12.5]}) for n in range(5)]
    lines = b"".join(orjson.dumps(each) + b"\n" for each in records)
    shard.unlink()
    shard, merged, scored = (folder / name for name in ("gen_data0.jsonl", "gen_data.jsonl", "data_with_logps.jsonl"))
    for path in (shard, merged, scored):
        path.write_bytes(lines)
    (folder / "prompts.jsonl").write_text("")
    templates = {"chat_template": folder / "prompts.jsonl"} if template == "sampling" else {}
    arguments = GenerationArguments(dataset_name_or_path="prompts.jsonl", response_logps=True, **sampling)
    made_by("generate", shard, arguments, {"prompts": folder / "prompts.jsonl", **templates})
    made_by("merge", merged, StageArguments(), {"shard0": shard})
    made_by("logps", scored, StageArguments(), {"dataset": merged}, noted=noted or {})
    (folder / "evaluated.jsonl").symlink_to(scored.name)


def test_the_policys_log_probabilities_of_sampling_give_the_kl_and_round_0_the_methods_error(tmp_path):
    for number in range(3):
        evaluate(tmp_path / "first", number)
    evaluate(tmp_path / "first", 3, temperature=0.7)
    (tmp_path / "first").rename(tmp_path / "moved")
    shown = report(tmp_path / "moved").stdout
    found = orjson.loads((tmp_path / "moved/summary.json").read_bytes())
    assert [entry["kl"] for entry in found["rounds"]] == [0.25, 0.75, 1.25, None]
    assert found["kl_notes"] == [
        "KL is left out: the held-out responses were sampled at temperature 0.7 (round 3).",
        "KL: method's error: 0.25 nats at round 0, whose policy is the model compared with.",
    ]
    assert all(note in " ".join(shown.split()) for note in found["kl_notes"])


def test_log_probabilities_that_get_logps_gave_the_policy_come_before_those_of_sampling(tmp_path):
    write_run(tmp_path, change=lambda each: each | {"response_logps": [[-1.0] * 3, [-1.0] * 5]})
    assert [entry["kl"] for entry in summary(tmp_path)["rounds"]] == [0, 2, 4]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"temperature": 0.7}, "the held-out responses were sampled at temperature 0.7"),
        ({"top_p": 0.9, "temperature": 0.7, "top_k": 5}, "were sampled at temperature 0.7, top-p 0.9 and top-k 5"),
        ({"template": "sampling"}, "the held-out responses were sampled with one --chat_template and scored with another"),
        ({"noted": {RETOKENISED: {"responses": 3, "prompts": ["a"]}}}, "get_logps.py tokenised 3 responses again"),
    ],
)
def test_where_the_policy_itself_was_not_sampled_the_kl_is_left_out_with_the_reason(tmp_path, changes, reason):
    evaluate(tmp_path, 0, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=7, stop=["x"], seed=3)  # change nothing
    evaluate(tmp_path, 1, **changes)
    paths = evaluated_files(tmp_path)
    rounds, sentences = zip(*(checked(path, metrics.read_round(path)) for path in paths), strict=True)
    numbers = metrics.summarize(rounds)
    assert [entry["kl"] for entry in numbers] == [0.25, None]
    assert sentences[0] is None
    said, _ = notes(sentences, numbers)
    assert said.startswith("KL is left out: ") and reason in said and said.endswith(" (round 1).")


def test_behind_a_gold_scorer_that_leaves_no_manifest_it_is_known_how_the_responses_were_sampled(tmp_path):
    evaluate(tmp_path, 0, temperature=0.7)
    folder = tmp_path / "heldout/round0"
    (folder / "data_with_gold.jsonl").write_bytes((folder / "data_with_logps.jsonl").read_bytes())
    (folder / "evaluated.jsonl").unlink()
    (folder / "evaluated.jsonl").symlink_to("data_with_gold.jsonl")
    (path,) = evaluated_files(tmp_path)
    _, said = checked(path, metrics.read_round(path))
    assert said == "KL is left out: the held-out responses were sampled at temperature 0.7"


def test_without_manifests_the_kl_is_given_and_what_it_assumes_is_said(tmp_path):
    found = summary(write_run(tmp_path))
    assert found["rounds"][-1]["kl"] == 4
    assert any(note.startswith("KL assumes temperature 1 and top-p 1: no manifest says how") for note in found["kl_notes"])
    nothing = summary(write_run(tmp_path / "nothing", change=without("logps_by")))
    assert nothing["kl_notes"] == []


def test_one_round_and_one_prompt_are_enough_and_have_no_interval(tmp_path):
    write_round(tmp_path, 0, [record(0, 0)])
    write_round(tmp_path, 1, [record(0, 1)])
    last = summary(tmp_path)["rounds"][-1]
    assert last["proxy_mean"] == pytest.approx(1.025)
    assert last["win_rate_ci"] is None


def test_rounds_may_hold_the_prompts_in_another_order_and_without_ids(tmp_path):
    write_run(tmp_path)
    expected = summary(tmp_path)["rounds"]
    for round_ in range(3):
        write_round(
            tmp_path,
            round_,
            [without("id")(record(n, round_)) for n in (range(5), (4, 2, 0, 1, 3))[round_ % 2]],
        )
    found = summary(tmp_path)["rounds"]
    assert [entry["win_rate"] for entry in found] == [entry["win_rate"] for entry in expected]
    assert [entry["gold_mean"] for entry in found] == pytest.approx([e["gold_mean"] for e in expected])


scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=6).map(np.array)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=5))
def test_the_win_rate_is_that_of_mann_and_whitney_and_swapping_the_sides_gives_the_rest(prompts):
    ours, theirs = zip(*prompts, strict=True)
    rates = metrics.win_rates(ours, theirs)
    expected = [stats.mannwhitneyu(a, b).statistic / (len(a) * len(b)) for a, b in prompts]
    assert rates == pytest.approx(expected)
    assert rates + metrics.win_rates(theirs, ours) == pytest.approx(1)
    assert metrics.win_rates(ours, ours) == pytest.approx(0.5)


def test_the_interval_is_students_and_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    values = generator.normal(size=30)
    mean, interval = metrics.mean_and_interval(values)
    expected = stats.t.interval(0.95, 29, loc=mean, scale=stats.sem(values))
    assert interval == pytest.approx(expected)
    intervals = [metrics.mean_and_interval(generator.exponential(size=100))[1] for _ in range(2000)]
    assert 0.92 < np.mean([low < 1 < high for low, high in intervals]) < 0.97


def test_distinctness_sees_one_answer_for_all_prompts_and_within_a_prompt_equal_samples(tmp_path):
    for round_, texts in enumerate((["a", "b"], ["c", "c"])):
        write_round(tmp_path, round_, [record(number, round_, responses=texts) for number in range(5)])
    first, last = summary(tmp_path)["rounds"]
    assert (first["distinct"], first["distinct_within"]) == (0.2, 1)
    assert (last["distinct"], last["distinct_within"]) == (0.1, 0.5)


def test_rounds_are_compared_on_the_prompts_that_all_of_them_have(tmp_path):
    write_run(tmp_path)
    write_round(tmp_path, 1, [record(number, 1) for number in (0, 1, 2, 4)])
    write_round(tmp_path, 2, [record(number, 2) for number in (5, 4, 2, 0, 1)])
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    found = orjson.loads((tmp_path / "summary.json").read_bytes())
    assert [entry["prompts"] for entry in found["rounds"]] == [4, 4, 4]
    assert found["left_out"] == {"prompts": 2, "of": 6, "missing": {"0": 1, "1": 2, "2": 1}}
    common = write_run(tmp_path / "common")
    for number in range(3):
        write_round(common, number, [record(n, number) for n in (0, 1, 2, 4)])
    assert found["rounds"] == summary(common)["rounds"]
    said = "2 of 6 prompts (33.3%) are left out: not all rounds have responses with rewards to them (missing: 1 in round 0"
    assert said in done.stderr and said in " ".join(done.stdout.split())


def test_a_few_prompts_left_out_are_said_without_a_warning(tmp_path):
    for number in range(2):
        write_round(tmp_path, number, [record(n, number) for n in range(200 - number)])
    done = report(tmp_path)
    assert "left out" in done.stdout and "left out" not in done.stderr


def judged(number: int, round_: int) -> Record:
    """`record`, whose proxy is the sum of two scorers, and which two others judge."""
    made = record(number, round_)
    proxy, gold = made["rewards"], made["rewards_by"]["gold"]
    by = {"help": [score / 2 for score in proxy], "brief": [score / 2 for score in proxy]}
    return made | {"rewards_by": {**by, "strict": [-score for score in proxy], "gold": gold, "kind": [1.0, 1.0]}}


def test_each_evaluation_scorer_has_its_win_rate_gold_first_and_the_optimised_reward_last(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("")
    for number in range(2):
        path = write_round(tmp_path, number, [judged(n, number) for n in range(5)])
        arguments = Weights(weights=[1.0, 0.5, 0.0, 0.0])
        scorers = {"scorers": ["help=bt", "brief=function:brief", "strict=judge", "kind=judge"]}
        made_by("annotate", path, arguments, {"dataset": tmp_path / "prompts.jsonl"}, settings=scorers)
    done = report(tmp_path)
    last = orjson.loads((tmp_path / "summary.json").read_bytes())["rounds"][1]
    assert {name: (judge["win_rate"], judge["optimised"]) for name, judge in last["judges"].items()} == {
        "gold": (0.875, False), "kind": (0.5, False), "strict": (0.0, False), "proxy": (1.0, True),
    }  # fmt: skip
    assert list(last["judges"]) == ["gold", "kind", "strict", "proxy"]
    assert (last["win_rate_by"], last["win_rate"]) == ("gold", 0.875)
    assert last["judges"]["strict"]["mean"] == -last["proxy_mean"]
    assert "the reward that was optimised" in " ".join(done.stdout.replace("│", " ").split())


def test_a_gold_score_that_was_trained_on_is_no_judge_and_no_gold_score(tmp_path):
    rounds = [metrics.read_round(write_round(tmp_path, number, [judged(n, number) for n in range(5)])) for number in range(2)]
    assert metrics.judges_of(rounds, frozenset({"gold", "help"})) == ["brief", "kind", "strict", "proxy"]
    assert [entry["gold_mean"] for entry in metrics.summarize(rounds, frozenset({"gold"}))] == [None, None]


def test_without_gold_an_evaluation_scorer_comes_first_and_what_equals_the_proxy_is_no_judge(tmp_path):
    def change(each: Record) -> Record:
        return each | {"rewards_by": {"bt": each["rewards"], "strict": [-score for score in each["rewards"]]}}

    done = summary(write_run(tmp_path / "strict", change=change))["rounds"][-1]
    assert (list(done["judges"]), done["win_rate_by"], done["win_rate"]) == (["strict", "proxy"], "strict", 0)
    write_run(tmp_path / "proxy", change=without("rewards_by"))
    assert "by the reward that was optimised" in " ".join(report(tmp_path / "proxy").stdout.split())


def logged(run_dir: Path, number: int, *lines: dict, end: str = "") -> None:
    path = run_dir / f"round{number}/metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines) + end.encode())


STEP = {"step": 5, "epoch": 0.5, "loss": 0.6, "learning_rate": 1e-6, "rewards/margins": None, "rewards/accuracies": 0.7}


def test_a_run_without_held_out_prompts_has_its_trainings_drawn(tmp_path):
    more = STEP | {"step": 10, "loss": 0.5}
    logged(tmp_path, 1, STEP, more, {"step": 10, "eval_loss": 0.7}, {"step": 10, "train_runtime": 3.0}, end='{"step": 15, "lo')
    logged(tmp_path, 10, STEP)
    found = summary(tmp_path)
    account = [{"round": 1, "step": 10, "lines": 2, "loss": 0.5}, {"round": 10, "step": 5, "lines": 1, "loss": 0.6}]
    assert (found["training"], found["rounds"]) == (account, [])
    picture = tmp_path / "training.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and not (tmp_path / "progress.png").exists()
    stamp = picture.stat().st_mtime_ns
    summary(tmp_path)
    assert picture.stat().st_mtime_ns == stamp
    logged(tmp_path, 2, {"loss": 0.1})
    assert "round2/metrics.jsonl:1: expected an object with a `step`" in report(tmp_path).stderr


def test_a_training_too_short_to_log_a_loss_does_not_end_a_run_without_held_out_prompts_in_an_error(tmp_path):
    logged(tmp_path, 1, {"step": 1, "train_loss": 0.7})
    (tmp_path / "round1/pairs.jsonl").touch()
    made_by("dpo", tmp_path / "round1/pairs.jsonl", StageArguments(), {})
    assert [stage["stage"] for stage in summary(tmp_path)["stages"]] == ["dpo"]


def test_intervals_and_figures_lie_within_the_picture(tmp_path):
    def drawn(rounds: list[dict]) -> dict[str, tuple[float, float]]:
        figures = []
        patch = pytest.MonkeyPatch()
        patch.setattr(plot, "save", lambda figure, path: figures.append(figure))
        plot.draw(rounds, "a run", tmp_path / "unused.png")
        patch.undo()
        return {axis.get_title(loc="left"): axis.get_ylim() for axis in figures[0].axes}

    values = summary(write_run(tmp_path))["rounds"]
    for low, high in ((-3.0, 0.5), (-1e-3, 1e-3), (2.0, 90.0)):
        for entry in values:
            entry |= {"kl": (low + high) / 2, "kl_ci": [low, high], "length_mean_ci": [1.0, high + 200]}
        limits = drawn(values)
        for name, bottom, top in (("KL to round 0's model", low, high), ("Length", 1.0, high + 200)):
            assert limits[name][0] < bottom and top < limits[name][1]


def test_the_picture_is_a_png_drawn_again_only_when_a_number_changes(tmp_path):
    summary(write_run(tmp_path))
    picture = tmp_path / "progress.png"
    content = picture.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n")
    assert width > 1000
    assert height > 500
    stamp = picture.stat().st_mtime_ns
    summary(tmp_path)
    assert picture.stat().st_mtime_ns == stamp
    write_round(tmp_path, 3, [record(number, 3) for number in range(5)])
    assert len(summary(tmp_path)["rounds"]) == 4
    assert picture.stat().st_mtime_ns > stamp
    assert not list(tmp_path.glob("*.partial"))


def test_the_accounts_of_stages_are_added_up_over_shards(tmp_path):
    write_run(tmp_path)
    (tmp_path / "round1").mkdir()
    manifests = {
        "gen_data0.jsonl": {
            "stage": "generate",
            "counts": {"in": 7, "out": 6, "dropped": {"too long": 1}},
            "tokens": 10,
        },
        "gen_data1.jsonl": {"stage": "generate", "counts": {"in": 6, "out": 6, "dropped": {}}, "tokens": 20},
        "pairs.jsonl": {
            "stage": "pairs",
            "counts": {"in": 12, "out": 8, "dropped": {"ties": 3, "identical": 1}},
        },
    }
    for number, (name, manifest) in enumerate(manifests.items()):
        facts = {"started": f"2026-01-01T00:00:0{number}+0000", "seconds": 1.5, "arguments": {}, "inputs": {}}
        (tmp_path / "round1" / f"{name}.manifest.json").write_bytes(orjson.dumps(manifest | facts))
    unfinished = {"stage": "dpo", "arguments": {}, "inputs": {}, "started": "2026-01-01T00:00:09+0000"}
    (tmp_path / "round1" / "policy.partial.manifest.json").write_bytes(orjson.dumps(unfinished))
    generate = {"stage": "generate", "in": 13, "out": 12, "dropped": 1, "seconds": 3.0, "tokens": 30}
    pairs = {"stage": "pairs", "in": 12, "out": 8, "dropped": 4, "seconds": 1.5, "tokens": None}
    assert summary(tmp_path)["stages"] == [{"folder": "round1", **generate}, {"folder": "round1", **pairs}]


def test_what_a_model_says_cannot_command_the_terminal(tmp_path):
    attack = "[bold red]x[/] [/nonsense] \x1b[2J\x1b]0;title\x07\x9b31m\r\u202egnp\u2066\x00\x7f"
    write_run(tmp_path, change=lambda record: record | {"responses": [attack, "b"], "prompt": attack})
    program = [sys.executable, str(ROOT / "report/summarize.py"), "--run_dir", str(tmp_path)]
    leader, follower = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    with subprocess.Popen(program, env=environment, stdout=follower, stderr=subprocess.DEVNULL) as process:
        os.close(follower)
        shown = b""
        while chunk := _read(leader):
            shown += chunk
    os.close(leader)
    assert process.returncode == 0
    text = shown.decode().replace("\r\n", "\n")
    assert "[bold red]x[/] [/nonsense]" in text
    assert "\\x1b[2J" in text
    assert not {character for character in text if not character.isprintable()} - {"\n"}


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the program has ended
        return b""


def test_samples_of_the_first_and_the_last_round_stand_side_by_side(tmp_path):
    shown = report(write_run(tmp_path), "--samples", "2").stdout
    assert all(text in shown for text in ("Film 0", "good 0 0", "good 0 2", "Film 1", "good 1 2"))
    assert "Film 2" not in shown
    assert "Film 0" not in report(tmp_path, "--samples", "0").stdout


def replace_line(**changes: object) -> Callable[[Path], None]:
    """Changes the second record of round 1."""

    def change(run_dir: Path) -> None:
        records = [record(number, 1) for number in range(5)]
        records[1] |= changes
        write_round(run_dir, 1, records)

    return change


def remove_round(number: int) -> Callable[[Path], None]:
    return lambda run_dir: (run_dir / f"heldout/round{number}/evaluated.jsonl").unlink()


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (remove_round(0), "round0/evaluated.jsonl", "evaluate round 0"),
        (remove_round(1), "round1/evaluated.jsonl", "evaluate round 1"),
        (lambda d: write_round(d, 1, []), "round1/evaluated.jsonl", "holds no records"),
        (
            lambda d: write_round(d, 1, [record(n, 1) for n in range(5, 9)]),
            "round1/evaluated.jsonl",
            "no prompt is in all of",
        ),
        (replace_line(id=f"{0:016x}"), "round1/evaluated.jsonl:2", "was already on"),
        (replace_line(rewards=[1.0]), "round1/evaluated.jsonl:2", "1 `rewards` for 2 `responses`"),
        (replace_line(rewards=None), "round1/evaluated.jsonl:2", "`rewards` must be"),
        (replace_line(responses=[]), "round1/evaluated.jsonl:2", "`responses` must be"),
        (
            replace_line(rewards_by={"gold": [1.0, None]}),
            "round1/evaluated.jsonl:2",
            "`rewards_by.gold` must hold 2",
        ),
        (replace_line(rewards_by=[1.0, 2.0]), "round1/evaluated.jsonl:2", "`rewards_by` must be an object"),
        (
            replace_line(logps_by={"policy": [1.0], "initial": [1.0, 2.0]}),
            "round1/evaluated.jsonl:2",
            "`logps_by.policy` must hold 2",
        ),
        (
            replace_line(response_token_ids=[1, 2]),
            "round1/evaluated.jsonl:2",
            "`response_token_ids` must be a list of token ids",
        ),
    ],
)
def test_bad_input_is_named_with_exit_code_2_and_the_old_report_stays(tmp_path, damage, file, message):
    write_run(tmp_path)
    (tmp_path / "summary.json").write_text("old")
    damage(tmp_path)
    done = report(tmp_path)
    assert done.returncode == 2
    assert file in done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "summary.json").read_text() == "old"


def test_a_run_that_is_not_there_is_named(tmp_path):
    done = report(tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere: no such folder" in done.stderr


def test_rounds_that_are_not_evaluated_yet_are_left_out(tmp_path):
    write_run(tmp_path)
    (tmp_path / "heldout/round3").mkdir()
    (tmp_path / "heldout/round3/gen_data.jsonl").write_text("")
    assert len(summary(tmp_path)["rounds"]) == 3
    assert all(math.isfinite(entry["win_rate"]) for entry in summary(tmp_path)["rounds"])
