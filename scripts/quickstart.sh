#!/usr/bin/env bash
# A whole run without a model hub, on a CPU or one GPU: a tiny chat model learns to write favourable film reviews.
# usage: bash scripts/quickstart.sh [--recipe FILE] [--run_dir DIR] [--seed N] [--device cpu|cuda]
#
# Sets up both environments, makes the data and a base model, trains the SFT model and the reward model, and then runs the recipe,
# configs/recipes/quickstart.env: three rounds of online DPO with an evaluation after each. Run it again after any failure.
# It runs on what the environments are made for; --device is that of setup_envs.sh, which --help there explains.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

recipe=$BATON_ROOT/configs/recipes/quickstart.env run_dir="" seed=0 device=()
while (($#)); do
  case $1 in
    --help | -h) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --recipe) (($# > 1)) || die "--recipe needs a value"; recipe=$(realpath -m "$2") ;;
    --run_dir) (($# > 1)) || die "--run_dir needs a value"; run_dir=$(realpath -m "$2") ;;
    --seed) [[ ${2:-} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "--seed needs a whole number below 1,000,000,000"; seed=$2 ;;
    --device) (($# > 1)) || die "--device needs a value"; device=(--device "$2") ;;
    *) die "unknown argument '$1'; there are --recipe, --run_dir, --seed, --device and --help" ;;
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
export CUDA_VISIBLE_DEVICES=${gpus%% *} QUICKSTART_DTYPE=bfloat16 QUICKSTART_BF16=true
if [[ $(env_device inference) == cuda ]]; then
  [[ -n $gpus ]] || die "$BATON_ENVS is made for CUDA, and there is no GPU to use here (nvidia-smi, CUDA_VISIBLE_DEVICES):" \
    "for a run on the CPU, BATON_ENVS=.envs-cpu bash scripts/quickstart.sh --device cpu"
  # GPUs before Ampere (compute capability 8.0) have no bfloat16.
  capability=$(nvidia-smi --id="$CUDA_VISIBLE_DEVICES" --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || true
  if [[ $capability =~ ^[1-7]\. ]]; then QUICKSTART_DTYPE=float32 QUICKSTART_BF16=false; fi
elif ! in_env training python -c 'import sys; from baton.program import cpu_has_bfloat16; sys.exit(not cpu_has_bfloat16())'; then
  QUICKSTART_DTYPE=float32 QUICKSTART_BF16=false
fi
say "runs on ${gpus:+GPU }${CUDA_VISIBLE_DEVICES:-the CPU} in $QUICKSTART_DTYPE"

data=$run_dir/data
stage data training quickstart/make_data.py --output_dir "$data" --seed "$seed" --prompts_per_round 256
stage base-model training quickstart/make_model.py --text "$data/sft.jsonl" --output_dir "$run_dir/base" \
  --seed "$seed"
stage sft training sft/run_sft.py configs/quickstart/sft.yaml --model_name_or_path "$run_dir/base" \
  --dataset_name_or_path "$data/sft.jsonl" --output_dir "$run_dir/sft" --seed "$seed" --bf16 "$QUICKSTART_BF16"
stage reward-model training reward_model/run_rm.py configs/quickstart/rm.yaml \
  --model_name_or_path "$run_dir/sft" --dataset_name_or_path "$data/rm_train.jsonl" \
  --eval_dataset_name_or_path "$data/rm_test.jsonl" --output_dir "$run_dir/reward_model" --seed "$seed" \
  --bf16 "$QUICKSTART_BF16"
run_stages || stages_failed $?

SEED=$seed exec bash scripts/run_loop.sh "$recipe" --run_dir "$run_dir"
