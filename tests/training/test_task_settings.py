"""Every setting of the pinned trainers decides the result or says how a training is executed; new ones must be placed."""

import dataclasses

import pytest
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from baton.arguments import StageArguments
from baton.errors import InputError
from baton.stage import Stage
from baton.task import BATCH_SPLIT, EXECUTION_SETTINGS

CONFIGS = (SFTConfig, RewardConfig, DPOConfig, KTOConfig)

DECIDES = set(
    """
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon optim_target_modules average_tokens_across_devices max_grad_norm label_smoothing_factor
    bf16 fp16 bf16_full_eval fp16_full_eval tf32 neftune_noise_alpha auto_find_batch_size
    eval_strategy eval_steps eval_delay eval_on_start load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed accelerator_config
    dataloader_drop_last dataloader_in_order remove_unused_columns label_names train_sampling_strategy length_column_name
    model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout max_length truncation_mode
    chat_template_path dataset_text_field dataset_kwargs eos_token pad_token shuffle_dataset packing packing_strategy
    eval_packing completion_only_loss assistant_only_loss
    center_rewards_coefficient
    loss_type loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau
    sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    desirable_weight undesirable_weight
    """.split()
)


def fields_of(config_class: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(config_class) if field.init}


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_setting_of_a_trainer_is_placed(config_class):
    unplaced = fields_of(config_class).keys() - DECIDES - EXECUTION_SETTINGS - BATCH_SPLIT.keys()
    assert not unplaced, "say in baton/task.py (execution) or here (decides the result) what these are"


def test_no_setting_is_placed_twice_and_none_is_placed_that_no_trainer_has():
    assert not DECIDES & (EXECUTION_SETTINGS | BATCH_SPLIT.keys())
    names = set().union(*(fields_of(config_class) for config_class in CONFIGS))
    assert (DECIDES | EXECUTION_SETTINGS | BATCH_SPLIT.keys()) <= names


@pytest.mark.parametrize("config_class", CONFIGS)
def test_the_batch_is_split_by_default_as_the_trainer_does(config_class):
    assert {name: fields_of(config_class)[name].default for name in BATCH_SPLIT} == BATCH_SPLIT


@pytest.mark.parametrize(
    ("settings", "same"),
    [({"beta": 0.1, "max_steps": "-1", "lr_scheduler_type": "linear"}, True), ({"beta": 0.2}, False), ({"seed": 1}, False)],
)
def test_a_default_that_is_given_is_the_same_task_as_one_that_is_left_out(tmp_path, settings, same):
    output = tmp_path / "out"
    stage = Stage.begin("dpo", StageArguments(), output, {}, {}, lambda: DPOConfig)
    output.write_text("done\n")
    stage.finish(records_in=1, records_out=1)
    if same:
        assert Stage.begin("dpo", StageArguments(), output, {}, settings, lambda: DPOConfig) is None
    else:
        with pytest.raises(InputError, match="finished, of another task"):
            Stage.begin("dpo", StageArguments(), output, {}, settings, lambda: DPOConfig)
