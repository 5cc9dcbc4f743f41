#!/usr/bin/env bash
# Online training, round after round: sample from the policy, score, pick pairs, train, and start again from the new policy.
# usage: bash scripts/run_loop.sh RECIPE [--run_dir DIR] [--plan]
# for example: bash scripts/run_loop.sh configs/recipes/llama3-8b.env
#
# --plan prints the command of every stage, says which are up to date, and runs nothing. A recipe is a shell file of variables,
# which docs/loop.md explains; configs/recipes/ has some. The loop holds no state: every stage knows whether it is done, so
# after any failure the same command goes on where the run stopped. All stages are checked before the first one starts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() { sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

recipe="" run_dir="" show_plan=""
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --plan) show_plan=yes; shift ;;
    --run_dir=*) set -- --run_dir "${1#*=}" "${@:2}" ;;
    --run_dir) [[ -n ${2:-} ]] || die "--run_dir needs a value"; run_dir=$(realpath -m "$2"); shift 2 ;;
    -*) die "unknown argument '$1'; there are --run_dir, --plan and --help" ;;
    *) [[ -z $recipe ]] || die "one recipe at a time, got '$recipe' and '$1'"; recipe=$(realpath -m "$1"); shift ;;
  esac
done
[[ -n $recipe ]] || { usage >&2; die "which recipe?"; }
check_recipe "$recipe"
cd "$BATON_ROOT"

visible=$(gpu_ids)
read -ra gpus <<<"$visible"
# The variables of a recipe, with what each is where the recipe leaves it out.
INITIAL_POLICY="" REWARD_MODEL="" ROUNDS="" REFERENCE=initial SEED=${SEED:-0}
PROMPTS=() PROMPT_ARGS=() DATASET_KEY="" ROLLOUT_BATCH_SIZE="" SYSTEM_PROMPT="" CHAT_TEMPLATE=""
K=8 TEMPERATURE=1.0 TOP_P=1.0 MAX_NEW_TOKENS=1024 MAX_MODEL_LEN=4096 GENERATE_WITH=shards GENERATE_ARGS=()
SCORERS=() WEIGHTS=() REWARD_ARGS=()
GPUS=${#gpus[@]} ACCELERATE_CONFIG=configs/zero2.yaml DPO_CONFIG=configs/training.yaml DPO_ARGS=()
TRAINER=dpo TRAIN_CONFIG="" TRAIN_ARGS=() SERVER_GPUS=0 LEVELS=()
HELDOUT_PROMPTS="" HELDOUT_K=1 HELDOUT_ARGS=() EVAL_SCORERS=() GOLD_SCORER="" SAMPLES=3
variables=(
  INITIAL_POLICY REWARD_MODEL ROUNDS REFERENCE SEED DATASET_KEY ROLLOUT_BATCH_SIZE SYSTEM_PROMPT CHAT_TEMPLATE
  K TEMPERATURE TOP_P MAX_NEW_TOKENS MAX_MODEL_LEN GENERATE_WITH GPUS ACCELERATE_CONFIG DPO_CONFIG
  TRAINER TRAIN_CONFIG SERVER_GPUS
  HELDOUT_PROMPTS HELDOUT_K GOLD_SCORER SAMPLES
)
lists=(PROMPTS PROMPT_ARGS GENERATE_ARGS SCORERS WEIGHTS REWARD_ARGS DPO_ARGS TRAIN_ARGS LEVELS HELDOUT_ARGS EVAL_SCORERS)
export RUN_DIR=${run_dir:-$BATON_ROOT/runs/$(basename "$recipe" .env)}
run_dir=$RUN_DIR devices=${CUDA_VISIBLE_DEVICES-all}
if [[ -n $show_plan ]]; then check_path "$run_dir"; else check_folder "$run_dir"; fi   # a plan may be that of another user's run
# What a recipe cannot set: the shell says so, with file and line.
readonly recipe run_dir RUN_DIR show_plan devices visible variables lists
trap recipe_stopped EXIT
mapfile -t before < <(compgen -v)
# shellcheck source=/dev/null
source "$recipe"
trap - EXIT
[[ ${CUDA_VISIBLE_DEVICES-all} == "$devices" ]] ||
  die "$recipe: sets CUDA_VISIBLE_DEVICES: set it before the command; a recipe says how many of those GPUs it takes, with GPUS"
read -ra gpus <<<"$visible"
mapfile -t new < <(LC_ALL=C comm -13 <(printf '%s\n' "${before[@]}" before | LC_ALL=C sort) <(compgen -v | LC_ALL=C sort))

# Prints VARIABLE=WORD for each word of the recipe's lists.
list_words() {
  local name
  for name in "${lists[@]}"; do
    local -n words=$name
    ((${#words[@]} == 0)) || printf "$name=%s\0" "${words[@]}"
  done
}
list_words |
  in_env inference python -m baton.launch recipe --name "$recipe" --known "${variables[@]}" "${lists[@]}" --new "${new[@]}" || exit
for variable in "${variables[@]}"; do
  [[ $(declare -p "$variable") != "declare -a"* ]] || die "$recipe: $variable is one value, without parentheses"
done
for variable in INITIAL_POLICY PROMPTS; do
  [[ -n ${!variable:-} ]] || die "$recipe: sets no $variable"
done
[[ $REFERENCE =~ ^(initial|previous|mix:0?\.[0-9]*[1-9][0-9]*)$ ]] ||
  die "$recipe: REFERENCE is initial, previous or mix:ALPHA, with ALPHA between 0 and 1 such as 0.6, not '$REFERENCE'"
[[ $TRAINER =~ ^(dpo|kto|raft|conditional_sft|distillation|ppo|online_dpo)$ ]] ||
  die "$recipe: TRAINER is dpo, kto, raft, conditional_sft, distillation, ppo or online_dpo, not '$TRAINER'"
# ppo and online_dpo sample themselves, on warm servers.
online=""
[[ ! $TRAINER =~ ^(ppo|online_dpo)$ ]] || online=yes
[[ $TRAINER == dpo || -n $TRAIN_CONFIG ]] || die "$recipe: TRAINER=$TRAINER needs its settings: TRAIN_CONFIG, a YAML file"
[[ $TRAINER != dpo || -z $TRAIN_CONFIG ]] || die "$recipe: the configuration of TRAINER=dpo is DPO_CONFIG, not TRAIN_CONFIG"
[[ $TRAINER != dpo || -z ${TRAIN_ARGS[*]:-} ]] || die "$recipe: the flags of TRAINER=dpo are DPO_ARGS, not TRAIN_ARGS"
[[ $TRAINER == conditional_sft || -z ${LEVELS[*]:-} ]] || die "$recipe: LEVELS is for TRAINER=conditional_sft"
[[ $TRAINER != conditional_sft ]] || ((${#LEVELS[@]})) || LEVELS=("<reward_"{1..5}">")
[[ $TRAINER == dpo || -z ${DPO_ARGS[*]:-} ]] || die "$recipe: the flags of TRAINER=$TRAINER are TRAIN_ARGS, not DPO_ARGS"
[[ ! $TRAINER =~ ^(raft|conditional_sft|distillation)$ || $REFERENCE == initial ]] ||
  die "$recipe: REFERENCE=$REFERENCE, but TRAINER=$TRAINER has no reference: leave it out"
[[ $GENERATE_WITH =~ ^(shards|servers)$ ]] || die "$recipe: GENERATE_WITH is shards or servers, not '$GENERATE_WITH'"
for variable in K HELDOUT_K ROUNDS ROLLOUT_BATCH_SIZE MAX_NEW_TOKENS MAX_MODEL_LEN; do
  [[ ${!variable} =~ ^([1-9][0-9]*)?$ ]] || die "$recipe: $variable is a whole number from 1, not '${!variable}'"
done
[[ $SERVER_GPUS =~ ^(0|[1-9][0-9]*)$ ]] || die "$recipe: SERVER_GPUS is a whole number, not '$SERVER_GPUS'"
[[ $SAMPLES =~ ^(0|[1-9][0-9]*)$ ]] || die "$recipe: SAMPLES is a whole number, not '$SAMPLES'"
[[ $GPUS =~ ^(0|[1-9][0-9]*)$ ]] || die "$recipe: GPUS is a whole number, not '$GPUS'"
[[ $SEED =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$recipe: SEED is a whole number below 1,000,000,000, not '$SEED'"
((SERVER_GPUS == 0 || SERVER_GPUS < GPUS)) || die "$recipe: SERVER_GPUS=$SERVER_GPUS of GPUS=$GPUS: none is left to train"
[[ -n $online || $SERVER_GPUS == 0 ]] || die "$recipe: SERVER_GPUS is for TRAINER=ppo and online_dpo, whose servers stay"
[[ -z $ACCELERATE_CONFIG || -f $ACCELERATE_CONFIG ]] ||
  die "$recipe: ACCELERATE_CONFIG=$ACCELERATE_CONFIG: no such file in $BATON_ROOT; there are" configs/{ddp,fsdp,zero}*.yaml
for variable in ROLLOUT_BATCH_SIZE PROMPT_ARGS; do
  [[ -z $online || -z ${!variable:-} ]] ||
    die "$recipe: $variable is not for TRAINER=$TRAINER: $TRAIN_CONFIG says which prompts a step takes"
done
((K > 1)) || [[ $TRAINER =~ ^(ppo|conditional_sft|distillation)$ ]] ||
  die "$recipe: K=$K: a preference pair needs 2 responses to a prompt; 8 is a good start"
if [[ -n $REWARD_MODEL ]] && ((${#SCORERS[@]})); then
  die "$recipe: sets both REWARD_MODEL and SCORERS: give the model among the scorers, SCORERS=(bt:$REWARD_MODEL …)"
elif [[ -z $REWARD_MODEL && ($TRAINER != distillation || -n $HELDOUT_PROMPTS) ]] && ((${#SCORERS[@]} == 0)); then
  die "$recipe: sets neither REWARD_MODEL nor SCORERS: what scores the responses?"
fi
for variable in HELDOUT_ARGS EVAL_SCORERS GOLD_SCORER; do
  [[ -n $HELDOUT_PROMPTS || -z ${!variable:-} ]] || die "$recipe: $variable is for evaluation, and HELDOUT_PROMPTS is empty"
done
if [[ -n $HELDOUT_PROMPTS && ,$(IFS=,; echo "${PROMPTS[*]}"), == *",$HELDOUT_PROMPTS,"* ]]; then
  [[ ${PROMPT_ARGS[*]}${HELDOUT_ARGS[*]} == *--dataset_split* ]] ||
    say "warning: HELDOUT_PROMPTS=$HELDOUT_PROMPTS is trained on too, so its numbers say nothing of other prompts"
fi
if ((GPUS > ${#gpus[@]})); then
  for_cpu=""
  [[ $(env_device inference) != cpu ]] ||
    for_cpu=" (the environments in $BATON_ENVS are made for the CPU; bash scripts/setup_envs.sh --device cuda changes them)"
  [[ -n $show_plan ]] || die "$recipe: GPUS=$GPUS, but there are ${#gpus[@]} to use$for_cpu"
  say "GPUS=$GPUS, and there are ${#gpus[@]} to use$for_cpu: the plan is that of a machine with $GPUS"
  mapfile -t gpus < <(seq 0 $((GPUS - 1)))
fi
CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:0:GPUS}")   # no stage takes one that the recipe leaves to others
export CUDA_VISIBLE_DEVICES LAUNCHER=${LAUNCHER:-local}
ROUNDS=${ROUNDS:-${#PROMPTS[@]}}
((${#PROMPTS[@]} == 1 || ${#PROMPTS[@]} >= ROUNDS)) || die "$recipe: $ROUNDS ROUNDS, but PROMPTS names ${#PROMPTS[@]} sets"
if [[ -n $ROLLOUT_BATCH_SIZE ]] && ((${#PROMPTS[@]} > 1)); then
  die "$recipe: ROLLOUT_BATCH_SIZE takes windows of one prompt set, but PROMPTS names ${#PROMPTS[@]}; join them: PROMPTS=(A,B)"
fi

# Prints the recipe as it is run: every variable with its value.
resolved_recipe() {
  local name
  for name in "${variables[@]}"; do printf '%s=%q\n' "$name" "${!name}"; done
  for name in "${lists[@]}"; do
    local -n values=$name
    printf '%s=(%s)\n' "$name" "$( ((${#values[@]} == 0)) || printf '%q ' "${values[@]}")"
  done
}

# Whether stages are only planned; then the names of those that are up to date.
planning=yes up_to_date=""

# Adds a stage to those that run_stages runs, unless it is up to date: step NAME inference|training [OPTION ...] PROGRAM …
# One that finishes without some records (exit code 3, with its output) does not end the run: its log names them.
step() {
  if [[ $'\n'$up_to_date$'\n' == *$'\n'$1$'\n'* ]]; then
    say "$1: up to date"
  else
    stage "$@"
  fi
}

# Samples K responses a prompt on all GPUs, in shards or through servers: generate STAGE POLICY PROMPTS K PREFIX [ARGUMENT ...]
generate() {
  local asks=()
  # A policy that has learnt what each response was worth is asked for the best.
  [[ $TRAINER != conditional_sft || $2 == "$INITIAL_POLICY" ]] || asks=(--prompt_prefix "${LEVELS[-1]} ")
  step "$1" inference --group sampling "generation/run_$GENERATE_WITH.py" --model_name_or_path "$2" \
    --dataset_name_or_path "$3" --K "$4" --output_dir "$5" --temperature "$TEMPERATURE" --top_p "$TOP_P" \
    --max_new_tokens "$MAX_NEW_TOKENS" --max_model_len "$MAX_MODEL_LEN" ${DATASET_KEY:+--dataset_key "$DATASET_KEY"} \
    ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} "${template_args[@]}" "${asks[@]}" "${GENERATE_ARGS[@]}" "${@:6}"
}

# Scores responses on all GPUs, or on the CPU: score STAGE PROGRAM [ARGUMENT ...]
# Where vLLM scores, each stage has a process of its own: its engine changes what the process sees, and needs its memory.
score() {
  local group=scoring
  [[ " ${scorers[*]} ${EVAL_SCORERS[*]}" != *[\ =]vllm:* ]] || group=$1
  step "$1" inference --gpus "$GPUS" --group "$group" "${@:2}"
}

# Runs a training program on all GPUs that servers leave, or on the CPU: train STAGE PROGRAM [ARGUMENT ...]
train() {
  step "$1" training --gpus "$((GPUS - SERVER_GPUS))" --accelerate_config "$ACCELERATE_CONFIG" "${@:2}"
}

# Samples responses of policy $2 to the held-out prompts; its own log-probabilities come with them: sample_heldout ROUND POLICY
sample_heldout() {
  [[ -z $HELDOUT_PROMPTS ]] || generate "evaluate$1-generate" "$2" "$HELDOUT_PROMPTS" "$HELDOUT_K" \
    "$run_dir/heldout/round$1/gen_data" --seed "$((SEED + 1000))" --response_logps "${HELDOUT_ARGS[@]}"
}

# Scores the held-out responses, by the scorers of the training too: score_heldout ROUND
score_heldout() {
  local folder=$run_dir/heldout/round$1
  [[ -n $HELDOUT_PROMPTS ]] || return 0
  score "evaluate$1-rewards" annotate_data/get_rewards.py --dataset_name_or_path "$folder/gen_data.jsonl" \
    --output_dir "$folder/data_with_rewards.jsonl" --scorer "${scorers[@]}" "${EVAL_SCORERS[@]}" \
    --weights "${weights[@]}" "${EVAL_SCORERS[@]/*/0}" "${REWARD_ARGS[@]}"
  score "evaluate$1-logps" annotate_data/get_logps.py --dataset_name_or_path "$folder/data_with_rewards.jsonl" \
    --models "initial=$INITIAL_POLICY" --output_dir "$folder/data_with_logps.jsonl" "${template_args[@]}"
  [[ -z $GOLD_SCORER ]] || step "evaluate$1-gold" inference --group scoring "$GOLD_SCORER" \
    --dataset_name_or_path "$folder/data_with_logps.jsonl" --output_dir "$folder/data_with_gold.jsonl"
}

# Runs what was added of a round and of the evaluation of its starting policy, whose last file gets a name: run_round EVALUATED
run_round() {
  local last=data_with_logps.jsonl
  [[ -z $GOLD_SCORER ]] || last=data_with_gold.jsonl
  [[ -z $planning ]] || return 0
  if [[ -n $HELDOUT_PROMPTS ]]; then  # first: what is evaluated can then be read while the round trains
    mkdir -p "$run_dir/heldout/round$1"
    ln -sfn "$last" "$run_dir/heldout/round$1/evaluated.jsonl"
  fi
  run_stages || exit
}

# Samples, scores and trains in stages that hand each other files: round_of_stages ROUND POLICY PROMPTS REFERENCE
round_of_stages() {
  local folder=$run_dir/round$1 window how=(rs)
  # Windows of one prompt set follow each other in one shuffle of it, so its seed is the same in all rounds.
  window=(--data_seed "$SEED" --rollout_batch_size "$ROLLOUT_BATCH_SIZE" --iter "$(($1 - 1))")
  [[ -n $ROLLOUT_BATCH_SIZE ]] || window=()
  generate "round$1-generate" "$2" "$3" "$K" "$folder/gen_data" --seed "$((SEED + $1))" "${window[@]}" "${PROMPT_ARGS[@]}"

  [[ $TRAINER == distillation ]] ||
    score "round$1-rewards" annotate_data/get_rewards.py --dataset_name_or_path "$folder/gen_data.jsonl" \
      --output_dir "$folder/data_with_rewards.jsonl" --scorer "${scorers[@]}" --weights "${weights[@]}" "${REWARD_ARGS[@]}"
  score_heldout "$(($1 - 1))"

  case $TRAINER in
    dpo)
      train_on "$1" "$2" dpo_iteration/run_dpo.py "$DPO_CONFIG" "$folder/data_with_rewards.jsonl" --ref_model "$4" \
        --pairs_path "$folder/pairs.jsonl" "${DPO_ARGS[@]}" ;;
    kto)
      train_on "$1" "$2" dpo_iteration/run_kto.py "$TRAIN_CONFIG" "$folder/data_with_rewards.jsonl" --ref_model "$4" \
        --examples_path "$folder/examples.jsonl" "${TRAIN_ARGS[@]}" ;;
    raft | conditional_sft)  # on the best response of each prompt, or on all of them with what each is worth
      [[ $TRAINER == raft ]] || how=(ca --levels "${LEVELS[@]}")
      step "round$1-demonstrations" inference --group scoring annotate_data/post_process.py --post_processor "${how[@]}" \
        --dataset_name_or_path "$folder/data_with_rewards.jsonl" --output_dir "$folder/demonstrations.jsonl"
      train_on "$1" "$2" sft/run_sft.py "$TRAIN_CONFIG" "$folder/demonstrations.jsonl" "${exact[@]}" "${TRAIN_ARGS[@]}" ;;
    distillation)  # on what the student itself says, of which the teacher has an opinion
      train_on "$1" "$2" distillation/run_kd.py "$TRAIN_CONFIG" "$folder/gen_data.jsonl" "${exact[@]}" "${TRAIN_ARGS[@]}" ;;
  esac
}

# The training stage of a round of stages: train_on ROUND POLICY PROGRAM CONFIG DATA [ARGUMENT ...]
train_on() {
  local folder=$run_dir/round$1
  train "round$1-train" "$3" "$4" --model_name_or_path "$2" --dataset_name_or_path "$5" --metrics_path "$folder/metrics.jsonl" \
    --output_dir "$folder/policy" --seed "$((SEED + $1))" "${template_args[@]}" "${@:6}"
}

# Trains on warm servers, which sample, and a reward server, in one stage: online_round ROUND POLICY PROMPTS REFERENCE
online_round() {
  local folder=$run_dir/round$1 program=ppo/run_ppo.py of_servers=()
  [[ $TRAINER == ppo ]] || program=dpo_iteration/run_online_dpo.py
  ((SERVER_GPUS == 0)) || of_servers=(--server_gpus "$(IFS=,; echo "${gpus[*]:GPUS - SERVER_GPUS:SERVER_GPUS}")")
  score_heldout "$(($1 - 1))"
  train "round$1-train" "$program" "$TRAIN_CONFIG" --model_name_or_path "$2" --ref_model "$4" --dataset_name_or_path "$3" \
    --K "$K" --temperature "$TEMPERATURE" --top_p "$TOP_P" --max_new_tokens "$MAX_NEW_TOKENS" \
    --scorer "${scorers[@]}" --weights "${weights[@]}" --reward_args="${reward_words% }" \
    ${DATASET_KEY:+--dataset_key "$DATASET_KEY"} ${SYSTEM_PROMPT:+--system_prompt "$SYSTEM_PROMPT"} \
    --metrics_path "$folder/metrics.jsonl" --output_dir "$folder/policy" --seed "$((SEED + $1))" \
    "${of_servers[@]}" "${template_args[@]}" "${exact[@]}" "${TRAIN_ARGS[@]}"
}

# Mixes the reference of round $1: ALPHA of its starting policy $2 and the rest of the reference before it, $3.
mix_reference() {
  local alpha=${REFERENCE#mix:} rest
  rest=$(LC_ALL=C awk -v alpha="$alpha" 'BEGIN { printf "%.10g", 1 - alpha }')
  step "round$1-reference" training dpo_iteration/mix_models.py --models "$2" "$3" --weights "$alpha" "$rest" \
    --output_dir "$run_dir/round$1/reference"
}

# All rounds, one stage after another; `policy` is then the last round's. What samples follows each other, and what scores:
# so libraries are imported, and a model is loaded, once for both.
relay() {
  local round prompts reference=$INITIAL_POLICY
  policy=$INITIAL_POLICY
  for ((round = 1; round <= ROUNDS; round++)); do
    prompts=${PROMPTS[$((round - 1))]:-${PROMPTS[0]}}
    sample_heldout "$((round - 1))" "$policy"

    # `initial` keeps the search in one KL ball around the SFT model; `previous` makes each round a mirror-descent step. `mix`
    # lies between them: the reference follows the policy by a share of the way.
    if [[ $REFERENCE == previous ]]; then reference=$policy; fi
    if [[ $REFERENCE == mix:* ]] && ((round > 1)); then
      mix_reference "$round" "$policy" "$reference"
      reference=$run_dir/round$round/reference
    fi
    if [[ -n $online ]]; then
      online_round "$round" "$policy" "$prompts" "$reference"
    else
      round_of_stages "$round" "$policy" "$prompts" "$reference"
    fi
    run_round "$((round - 1))"
    policy=$run_dir/round$round/policy
  done
  sample_heldout "$ROUNDS" "$policy"
  score_heldout "$ROUNDS"
  run_round "$ROUNDS"
}

# All stages see one chat template.
template_args=()
[[ -z $CHAT_TEMPLATE ]] || template_args=(--chat_template "$CHAT_TEMPLATE")
# The next round starts from all bits, as configs/training.yaml and kto.yaml say themselves: bfloat16 would round most of a
# small update away.
exact=(--export_dtype float32)
! grep -Eqs "^[\"']?export_dtype" "$TRAIN_CONFIG" || exact=()
# The reward is the weighted sum of the scorers'. In evaluation the EVAL_SCORERS score too, with weight 0: `rewards_by` has them.
scorers=("${SCORERS[@]}")
((${#scorers[@]})) || scorers=("bt:$REWARD_MODEL")
weights=("${WEIGHTS[@]}")
((${#weights[@]})) || weights=("${scorers[@]/*/1}")
# As one text, of which the programs that score on warm servers make words again, by Python's shlex. What nobody answers for is
# get_rewards.py's concern alone: those programs leave the prompt out.
reward_words="" quote="'" escaped_quote="'\"'\"'" previous_word=""
for word in "${REWARD_ARGS[@]}"; do
  [[ $word == --unanswered* || $previous_word == --unanswered ]] || reward_words+="'${word//$quote/$escaped_quote}' "
  previous_word=$word
done

# One command, which the shell has read whole before it starts: this file may change while a run goes on for days.
{
  say "run: $run_dir ($ROUNDS rounds, $GPUS GPUs); all stages are checked before the first one starts"
  relay
  if [[ -n $show_plan ]]; then
    printf '%s\0' "${stages[@]}" | in_env training python -m baton.launch plan --show
    exit
  fi
  up_to_date=$(printf '%s\0' "${stages[@]}" | in_env training python -m baton.launch plan) || die "nothing was started"
  planning="" stages=()

  mkdir -p "$run_dir"
  if [[ -f $run_dir/recipe.env ]] && ! diff -q "$run_dir/recipe.env" <(resolved_recipe) >/dev/null; then
    say "the recipe has changed since this run began:"
    diff "$run_dir/recipe.env" <(resolved_recipe) >&2 || true
  fi
  resolved_recipe >"$run_dir/recipe.env.partial" || die "$run_dir/recipe.env: cannot be written; is the disk full?"
  mv "$run_dir/recipe.env.partial" "$run_dir/recipe.env"
  relay
  in_env training python report/summarize.py --run_dir "$run_dir" --samples "$SAMPLES"
  say "done: the last policy is $policy"
  exit
}
