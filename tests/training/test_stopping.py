"""When a training ends early, and which of its checkpoints stay."""

from types import SimpleNamespace

import pytest
from transformers import TrainerState
from trl import SFTConfig

from baton.errors import InputError
from baton.stage import Stage
from baton.training.checkpoints import BestIsHere, StopEarly, checkpoints_to_keep, no_better_for
from baton.training.checks import check_kept
from baton.training.config import trainer_config
from baton.training.memory import Sharding


def ends_at(values, patience, greater=False):
    """The evaluation after which a training ends that evaluates to these, counted from 1; None: none."""
    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater)
    state, control = SimpleNamespace(log_history=[], global_step=0), SimpleNamespace(should_training_stop=False)
    for number, value in enumerate(values, 1):
        state.log_history += [{"loss": 9.0}, {"eval_loss": value}]
        StopEarly(patience).on_evaluate(args, state, control)  # a new one each time, as after a death
        if control.should_training_stop:
            return number
    return None


def test_a_training_ends_after_so_many_evaluations_without_a_better_one():
    assert ends_at([3, 2, 2.5, 2.1, 1], patience=2) == 4
    assert ends_at([3, 2, 2.5, 1, 1.5], patience=2) is None
    assert ends_at([1, 2, 3, 2], patience=1, greater=True) == 4
    assert ends_at([2, 2], patience=1) == 2  # as good is no better
    with pytest.raises(InputError, match="an evaluation has no eval_accuracy"):
        no_better_for(SimpleNamespace(metric_for_best_model="accuracy"), [{"eval_loss": 1.0}])


def test_the_best_checkpoint_stays_and_then_the_last_ones(tmp_path):
    for step in (2, 10, 6, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = SimpleNamespace(best_model_checkpoint=str(tmp_path / "checkpoint-4"))

    def kept(count, load_best):
        trainer = SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=load_best))
        return [int(path.name.split("-")[1]) for path in checkpoints_to_keep(trainer, tmp_path, count)]

    assert kept(2, True) == [4, 10] and kept(2, False) == [10, 6] and kept(9, True) == [4, 10, 6, 2] and kept(0, True) == []


def test_the_best_checkpoint_is_found_after_its_folder_was_moved(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    state = TrainerState(best_global_step=4)  # without a path: Transformers leaves out one that is not there
    BestIsHere().on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    for step in (None, 2):
        state = TrainerState(best_global_step=step)
        BestIsHere().on_train_begin(SimpleNamespace(output_dir=str(tmp_path)), state, None)
        assert state.best_model_checkpoint is None


def test_the_last_checkpoint_stays_beside_the_best_one(tmp_path):
    def limit(kept=0, **settings):
        evaluated = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch", "bf16": False}
        return trainer_config(SFTConfig, evaluated | settings, [], Stage(tmp_path / "out", {}), kept=kept).save_total_limit

    assert limit() == 2 and limit(load_best_model_at_end="false") == 1 and limit(kept=3) == 3 and limit(save_total_limit=1) == 1


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        ({"early_stopping": 2}, {}, "`early_stopping` needs `load_best_model_at_end: true`"),
        ({"keep_checkpoints": 1}, {"save_strategy": "no"}, "`save_strategy: no` writes none"),
        ({"keep_checkpoints": 3}, {"save_total_limit": 2}, "`save_total_limit` 2 deletes some of them"),
    ],
)
def test_what_cannot_be_kept_is_refused(arguments, config, message):
    given = SimpleNamespace(**{"early_stopping": None, "keep_checkpoints": 0, "use_peft": False} | arguments)
    usual = {"load_best_model_at_end": False, "save_strategy": "steps", "save_total_limit": 3}
    with pytest.raises(InputError, match=message):
        check_kept(given, SimpleNamespace(**usual | config), Sharding())
    check_kept(SimpleNamespace(early_stopping=None, keep_checkpoints=3), SimpleNamespace(**usual), Sharding())
