#!/usr/bin/env bash
# PPO and its kin on warm vLLM servers: starts servers, reward server and trainer, runs, and ends what it started.
# usage: bash scripts/run_ppo.sh                                 the quickstart's task, from nothing: models, PPO, evaluation
#        bash scripts/run_ppo.sh CONFIG [--flag value ...]       ppo/run_ppo.py on your models; see configs/ppo.yaml
#
# Variables, as in a recipe: GPUS, all of them (default: those that are visible); SERVER_GPUS, the last ones of them, which the
# servers have for themselves (default: 0, all are shared); ACCELERATE_CONFIG (default: the project's configs/zero2.yaml). Settings
# may stand in CONFIG or be flags. After any failure the same command goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
  --help | -h) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
  "" | --run_dir | --run_dir=* | --seed | --seed=* | --device | --device=*)
    exec bash "$BATON_ROOT/scripts/quickstart.sh" --recipe "$BATON_ROOT/configs/recipes/quickstart-ppo.env" "$@" ;;
  -*) die "unknown argument '$1': the configuration comes first; --help explains" ;;
esac
for variable in GPUS SERVER_GPUS; do
  [[ ${!variable:-} =~ ^(0|[1-9][0-9]*)?$ ]] || die "$variable is a whole number, not '${!variable}'"
done
accelerate_config=${ACCELERATE_CONFIG:-$BATON_ROOT/configs/zero2.yaml}
[[ -f $accelerate_config ]] ||
  die "ACCELERATE_CONFIG=$accelerate_config: no such file; there are" "$BATON_ROOT"/configs/{ddp,fsdp,zero}*.yaml
bash "$BATON_ROOT/scripts/setup_envs.sh"

read -ra gpus <<<"$(gpu_ids)"
count=${GPUS:-${#gpus[@]}} for_servers=${SERVER_GPUS:-0}
((count <= ${#gpus[@]})) || die "GPUS=$count, but there are ${#gpus[@]} to use"
((for_servers == 0 || for_servers < count)) || die "SERVER_GPUS=$for_servers of GPUS=$count: none is left to train"
servers=()
((for_servers == 0)) || servers=(--server_gpus "$(IFS=,; echo "${gpus[*]:count - for_servers:for_servers}")")
CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:0:count - for_servers}")
export CUDA_VISIBLE_DEVICES
BATON_PARENT=$$ in_env training python -m baton.launch run --name ppo --environment training \
  --gpus "$((count - for_servers))" --accelerate_config "$accelerate_config" \
  "$BATON_ROOT/ppo/run_ppo.py" "$1" "${servers[@]}" "${@:2}"
