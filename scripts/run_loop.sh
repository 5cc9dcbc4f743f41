#!/usr/bin/env bash
# Online iterative DPO, round after round: sample from the policy, score, pick pairs, train, and start again from the new policy.
# usage: bash scripts/run_loop.sh RECIPE [--run_dir DIR]      for example: bash scripts/run_loop.sh configs/recipes/llama3-8b.env
#
# A recipe is a shell file of variables; configs/recipes/ has some, and llama3-8b.env says what each one means. The loop holds no
# state: every stage knows whether it is done, so after any failure the same command goes on where the run stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() { sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

recipe="" run_dir=""
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --run_dir) (($# > 1)) || die "--run_dir needs a value"; run_dir=$(realpath -m "$2"); shift 2 ;;
    -*) die "unknown argument '$1'; there are --run_dir and --help" ;;
    *) [[ -z $recipe ]] || die "one recipe at a time, got '$recipe' and '$1'"; recipe=$(realpath -m "$1"); shift ;;
  esac
done
[[ -n $recipe ]] || { usage >&2; die "which recipe?"; }
[[ -f $recipe ]] || die "$recipe: no such recipe; configs/recipes/ has $(cd "$BATON_ROOT/configs/recipes" && echo *.env)"
cd "$BATON_ROOT"

visible=$(gpu_ids)
read -ra gpus <<<"$visible"
# What a recipe may leave out.
K=8 TEMPERATURE=1.0 TOP_P=1.0 MAX_NEW_TOKENS=1024 MAX_MODEL_LEN=4096 GENERATE_ARGS=() REWARD_ARGS=()
DATASET_KEY="" REFERENCE=initial GPUS=${#gpus[@]} SEED=${SEED:-0}
ACCELERATE_CONFIG=configs/zero2.yaml DPO_CONFIG=configs/training.yaml DPO_ARGS=()
HELDOUT_PROMPTS="" HELDOUT_K=1 GOLD_SCORER=""
NAME=$(basename "$recipe" .env)
export RUN_DIR=${run_dir:-$BATON_ROOT/runs/$NAME}
run_dir=$RUN_DIR
# shellcheck source=/dev/null
source "$recipe"
# These become words of command lines, which every user of the machine can read; printf has none of its own.
printf '%s\0' "${GENERATE_ARGS[@]}" "${REWARD_ARGS[@]}" "${DPO_ARGS[@]}" |
  in_env inference python -m baton.launch refuse-secrets --name "$recipe" || exit
for variable in INITIAL_POLICY REWARD_MODEL PROMPTS; do
  [[ -n ${!variable:-} ]] || die "$recipe: sets no $variable"
done
[[ $REFERENCE =~ ^(initial|previous)$ ]] || die "$recipe: REFERENCE is initial or previous, not '$REFERENCE'"
((GPUS <= ${#gpus[@]})) || die "$recipe: GPUS=$GPUS, but there are ${#gpus[@]} to use"
CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:0:GPUS}")   # no stage takes one that the recipe leaves to others
export CUDA_VISIBLE_DEVICES LAUNCHER=${LAUNCHER:-local}
ROUNDS=${ROUNDS:-${#PROMPTS[@]}}
((${#PROMPTS[@]} == 1 || ${#PROMPTS[@]} >= ROUNDS)) || die "$recipe: $ROUNDS ROUNDS, but PROMPTS names ${#PROMPTS[@]} sets"

mkdir -p "$run_dir"
if [[ -f $run_dir/recipe.env ]] && ! cmp -s "$recipe" "$run_dir/recipe.env"; then
  say "the recipe has changed since this run began:"
  diff "$run_dir/recipe.env" "$recipe" >&2 || true
fi
cp "$recipe" "$run_dir/recipe.env"

# Samples K responses a prompt, in shards on all GPUs: generate STAGE POLICY PROMPTS K OUTPUT_PREFIX [ARGUMENT ...]
generate() {
  stage "$1" inference generation/run_shards.py --model_name_or_path "$2" --dataset_name_or_path "$3" --K "$4" \
    --output_dir "$5" --temperature "$TEMPERATURE" --top_p "$TOP_P" --max_new_tokens "$MAX_NEW_TOKENS" \
    --max_model_len "$MAX_MODEL_LEN" "${GENERATE_ARGS[@]}" "${@:6}"
}

# Scores responses on all GPUs, or on the CPU: score STAGE PROGRAM [ARGUMENT ...]
score() {
  stage "$1" inference --gpus "$GPUS" "${@:2}"
}

# Runs a training program on all GPUs, or on the CPU: train STAGE PROGRAM [ARGUMENT ...]
train() {
  stage "$1" training --gpus "$GPUS" --accelerate_config "$ACCELERATE_CONFIG" "${@:2}"
}

# The initial policy has to see the prompts as they were sampled.
logps_args=()
for ((i = 0; i + 1 < ${#GENERATE_ARGS[@]}; i++)); do
  [[ ${GENERATE_ARGS[i]} != --chat_template ]] || logps_args=(--chat_template "${GENERATE_ARGS[i + 1]}")
done

# Samples and scores the held-out prompts; the policy's own log-probabilities come from sampling: evaluate ROUND POLICY
evaluate() {
  local round=$1 policy=$2 folder=$run_dir/heldout/round$1
  generate "evaluate$round-generate" "$policy" "$HELDOUT_PROMPTS" "$HELDOUT_K" "$folder/gen_data" --seed "$((SEED + 1000))" \
    --response_logps
  score "evaluate$round-rewards" annotate_data/get_rewards.py --dataset_name_or_path "$folder/gen_data.jsonl" \
    --reward_name_or_path "$REWARD_MODEL" --output_dir "$folder/data_with_rewards.jsonl" "${REWARD_ARGS[@]}"
  score "evaluate$round-logps" annotate_data/get_logps.py --dataset_name_or_path "$folder/data_with_rewards.jsonl" \
    --models "initial=$INITIAL_POLICY" --output_dir "$folder/data_with_logps.jsonl" "${logps_args[@]}"
  if [[ -n $GOLD_SCORER ]]; then
    stage "evaluate$round-gold" inference "$GOLD_SCORER" \
      --dataset_name_or_path "$folder/data_with_logps.jsonl" --output_dir "$folder/evaluated.jsonl"
  else
    ln -sfn data_with_logps.jsonl "$folder/evaluated.jsonl"
  fi
}

say "run: $run_dir ($ROUNDS rounds, $GPUS GPUs)"
policy=$INITIAL_POLICY
if [[ -n $HELDOUT_PROMPTS ]]; then evaluate 0 "$policy"; fi
for ((round = 1; round <= ROUNDS; round++)); do
  folder=$run_dir/round$round
  prompts=${PROMPTS[$((round - 1))]:-${PROMPTS[0]}}
  mkdir -p "$folder"

  generate "round$round-generate" "$policy" "$prompts" "$K" "$folder/gen_data" --seed "$((SEED + round))" \
    ${DATASET_KEY:+--dataset_key "$DATASET_KEY"}

  score "round$round-rewards" annotate_data/get_rewards.py --dataset_name_or_path "$folder/gen_data.jsonl" \
    --reward_name_or_path "$REWARD_MODEL" --output_dir "$folder/data_with_rewards.jsonl" "${REWARD_ARGS[@]}"

  # `initial` keeps the search in one KL ball around the SFT model; `previous` makes each round a mirror-descent step.
  reference=$INITIAL_POLICY
  if [[ $REFERENCE == previous ]]; then reference=$policy; fi
  train "round$round-train" dpo_iteration/run_dpo.py "$DPO_CONFIG" --model_name_or_path "$policy" \
    --ref_model "$reference" --dataset_name_or_path "$folder/data_with_rewards.jsonl" --pairs_path "$folder/pairs.jsonl" \
    --output_dir "$folder/policy" --seed "$((SEED + round))" "${DPO_ARGS[@]}"

  policy=$folder/policy
  if [[ -n $HELDOUT_PROMPTS ]]; then evaluate "$round" "$policy"; fi
done

if [[ -n $HELDOUT_PROMPTS ]]; then in_env training python report/summarize.py --run_dir "$run_dir"; fi
say "done: the last policy is $policy"
