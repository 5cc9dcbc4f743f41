#!/usr/bin/env bash
# Best-of-n: samples n responses to every prompt, scores them, and writes each prompt with its best response and that one's reward.
# usage: bash scripts/best_of_n.sh MODEL PROMPTS OUT.jsonl --n 16 --scorer bt:RM [flags of get_hf2.py] [-- flags of get_rewards.py]
#        bash scripts/best_of_n.sh … --check      shows each stage's command and what is wrong, and runs nothing
#
# Flags of get_hf2.py are --temperature, --max_new_tokens, --iter, --rollout_batch_size and others; docs/generate.md has them.
# All responses, their rewards and the logs stay in OUT.jsonl.stages/. The manifest of OUT.jsonl counts what was left out.
# --overwrite samples and scores afresh. After any failure the same command goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  --help | -h) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
esac
(($# >= 3)) && [[ $1 != -* && $2 != -* && $3 != -* ]] || die "give MODEL PROMPTS OUT.jsonl first; --help explains"
model=$1 prompts=$2 output=$3
[[ $output == *.jsonl ]] || die "the output is a file that ends in .jsonl, not '$output'"
shift 3

n="" checking="" scorers=() sampling=() scoring=() everywhere=()
while (($# > 0)); do
  case $1 in
    --n=* | --scorer=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --n) (($# > 1)) || die "--n needs a number"; n=$2; shift 2 ;;
    --scorer) shift; while (($# > 0)) && [[ $1 != -* ]]; do scorers+=("$1"); shift; done ;;
    --check) checking=yes; shift ;;
    --overwrite) everywhere=(--overwrite); shift ;;
    --K | --K=*) die "--K is --n here" ;;
    --) shift; scoring=("$@"); break ;;
    *) sampling+=("$1"); shift ;;
  esac
done
[[ $n =~ ^[1-9][0-9]*$ ]] || die "how many responses to each prompt? --n 16"
((${#scorers[@]} > 0)) || die "who scores? --scorer bt:MODEL; docs/annotate.md lists the kinds"

run_dir=$output.stages
read -ra gpus <<<"$(gpu_ids)"
stage generate inference "$BATON_ROOT/generation/run_shards.py" --model_name_or_path "$model" --dataset_name_or_path "$prompts" \
  --K "$n" --output_dir "$run_dir/gen_data" "${sampling[@]}" "${everywhere[@]}"
stage rewards inference --gpus "${#gpus[@]}" --group scoring "$BATON_ROOT/annotate_data/get_rewards.py" \
  --dataset_name_or_path "$run_dir/gen_data.jsonl" --output_dir "$run_dir/data_with_rewards.jsonl" --scorer "${scorers[@]}" \
  "${scoring[@]}" "${everywhere[@]}"
stage best inference "$BATON_ROOT/annotate_data/post_process.py" --post_processor best \
  --dataset_name_or_path "$run_dir/data_with_rewards.jsonl" --output_dir "$output" "${everywhere[@]}"

if [[ -n $checking ]]; then
  printf '%s\0' "${stages[@]}" | in_env training python -m baton.launch plan --show
  exit
fi
run_stages
grep -o "responses left out: .*" "$run_dir/logs/best.log" | tail -n 1 >&2 || true   # the log may have been deleted since
