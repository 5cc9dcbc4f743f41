#!/usr/bin/env bash
# A whole run on a machine with neither GPU nor model hub: a tiny chat model learns to write favourable film reviews.
# usage: bash scripts/quickstart.sh [--run_dir DIR] [--seed N]
#
# Sets up both environments, makes the data and a base model, trains the SFT model and the reward model, and then runs
# configs/recipes/quickstart.env: three rounds of online DPO with an evaluation after each. Run it again after any failure.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

run_dir=$BATON_ROOT/runs/quickstart seed=0
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --run_dir) (($# > 1)) || die "--run_dir needs a value"; run_dir=$(realpath -m "$2") ;;
    --seed) [[ ${2:-} =~ ^[0-9]+$ ]] || die "--seed needs a whole number"; seed=$2 ;;
    *) die "unknown argument '$1'; there are --run_dir, --seed and --help" ;;
  esac
  shift 2
done
cd "$BATON_ROOT"

bash scripts/setup_envs.sh

data=$run_dir/data
stage data training quickstart/make_data.py --output_dir "$data" --seed "$seed" --prompts_per_round 256
stage base-model training quickstart/make_model.py --text "$data/sft.jsonl" --output_dir "$run_dir/base" \
  --seed "$seed"
stage sft training sft/run_sft.py configs/quickstart/sft.yaml --model_name_or_path "$run_dir/base" \
  --dataset_name_or_path "$data/sft.jsonl" --output_dir "$run_dir/sft" --seed "$seed"
stage reward-model training reward_model/run_rm.py configs/quickstart/rm.yaml \
  --model_name_or_path "$run_dir/sft" --dataset_name_or_path "$data/rm_train.jsonl" \
  --eval_dataset_name_or_path "$data/rm_test.jsonl" --output_dir "$run_dir/reward_model" --seed "$seed"

SEED=$seed exec bash scripts/run_loop.sh configs/recipes/quickstart.env --run_dir "$run_dir"
