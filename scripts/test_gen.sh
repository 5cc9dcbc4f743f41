#!/usr/bin/env bash
# Samples K responses to every prompt, on all GPUs of the machine (or on its CPU), and merges the shards.
# usage: bash scripts/test_gen.sh --model_name_or_path MODEL --dataset_name_or_path PROMPTS --output_dir ./data/gen_data [--K 4 …]
#
# writes <output_dir>.jsonl. --my_world_size N cuts the prompts into N shards, by default one per GPU; with more shards than
# GPUs, a GPU that is free takes the next shard. Other flags go to generation/get_hf2.py. Each shard logs to <output_dir>i.log.
# After any failure the same command goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

output_dir=./data/gen_data
my_world_size=""
tensor_parallel_size=1
arguments=()
merge_arguments=()
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --model) arguments+=(--model_name_or_path "${2?--model needs a value}"); shift 2 ;;
    --prompts) arguments+=(--dataset_name_or_path "${2?--prompts needs a value}"); shift 2 ;;
    --output_dir) output_dir=${2?--output_dir needs a value}; shift 2 ;;
    --my_world_size) my_world_size=${2?--my_world_size needs a value}; shift 2 ;;
    --tensor_parallel_size) tensor_parallel_size=${2?--tensor_parallel_size needs a value}; shift 2 ;;
    --local_index) die "--local_index is this script's to give: it runs every shard" ;;
    --overwrite) merge_arguments+=("$1"); arguments+=("$1"); shift ;;
    *) arguments+=("$1"); shift ;;
  esac
done
((${#arguments[@]})) || { usage >&2; die "which model, which prompts?"; }
[[ $tensor_parallel_size =~ ^[1-9][0-9]*$ ]] || die "--tensor_parallel_size must be a positive number, not '$tensor_parallel_size'"

# One slot runs one shard at a time: a group of GPUs that share a copy of the model, or the CPU.
mapfile -t gpus < <(gpu_ids)
free_slots=()
for ((first = 0; first + tensor_parallel_size <= ${#gpus[@]}; first += tensor_parallel_size)); do
  free_slots+=("$(IFS=,; echo "${gpus[*]:first:tensor_parallel_size}")")
done
if ((${#gpus[@]} == 0)); then
  free_slots=(cpu)
elif ((${#free_slots[@]} == 0)); then
  die "--tensor_parallel_size $tensor_parallel_size, but there are ${#gpus[@]} GPUs"
fi
my_world_size=${my_world_size:-${#free_slots[@]}}
[[ $my_world_size =~ ^[1-9][0-9]*$ ]] || die "--my_world_size must be a positive number, not '$my_world_size'"
mkdir -p "$(dirname "$output_dir")"

declare -A slot_of shard_of   # by process
failed=()
failure=0

# Starts one shard in a slot: start_shard INDEX SLOT
start_shard() {
  local index=$1 slot=$2 place="GPU $2"
  [[ $slot != cpu ]] || place="the CPU"
  say "shard $index of $my_world_size starts on $place; log: $output_dir$index.log"
  (
    if [[ $slot != cpu ]]; then export CUDA_VISIBLE_DEVICES=$slot; fi
    in_env inference python "$BATON_ROOT/generation/get_hf2.py" "${arguments[@]}" --output_dir "$output_dir" \
      --local_index "$index" --my_world_size "$my_world_size" --tensor_parallel_size "$tensor_parallel_size"
  ) >>"$output_dir$index.log" 2>&1 &
  slot_of[$!]=$slot
  shard_of[$!]=$index
}

# Waits for any shard to end, and frees its slot.
wait_for_one() {
  local pid code=0
  wait -n -p pid || code=$?
  free_slots+=("${slot_of[$pid]}")
  if ((code != 0)); then
    failure=$code
    failed+=("${shard_of[$pid]}")
  fi
  unset "slot_of[$pid]" "shard_of[$pid]"
}

# Ends the shards that run when this script is ended; each keeps what it has finished.
stop_shards() {
  local shell children
  for shell in "${!slot_of[@]}"; do
    read -ra children <"/proc/$shell/task/$shell/children" || true
    kill "$shell" "${children[@]}" || true
  done 2>/dev/null
}
trap stop_shards EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for ((index = 0; index < my_world_size; index++)); do
  while ((${#free_slots[@]} == 0)); do wait_for_one; done
  # A failure such as a wrong flag would fail every shard alike: no more are started.
  if ((failure)); then break; fi
  start_shard "$index" "${free_slots[0]}"
  free_slots=("${free_slots[@]:1}")
done
while ((${#slot_of[@]})); do wait_for_one; done

for index in "${failed[@]}"; do
  say "shard $index failed; the end of $output_dir$index.log:"
  tail -n 15 "$output_dir$index.log" >&2
done
if ((failure)); then exit "$failure"; fi

in_env inference python "$BATON_ROOT/generation/merge_data.py" --base_path "$output_dir" --output_dir "$output_dir.jsonl" \
  --num_datasets "$my_world_size" "${merge_arguments[@]}"
