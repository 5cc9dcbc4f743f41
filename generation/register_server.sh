#!/usr/bin/env bash
# Starts one vLLM server per GPU (on CPU: --num_servers) and returns once all of them answer, or says why one does not.
# usage: bash generation/register_server.sh MODEL [options] [-- options of vLLM]
#        bash generation/register_server.sh --status | --stop
#
#   --num_servers N             by default one per visible GPU, or per --tensor_parallel_size of them; 1 on CPU
#   --port P                    the first server's port, 8000; the next ones follow
#   --host H                    the address to listen on, 127.0.0.1: this machine alone
#   --api_key KEY               what clients must know; $VLLM_API_KEY does the same, and no process list shows it
#   --timeout S                 give up on servers that are not ready after S seconds, 1800
#   --tensor_parallel_size N    --max_num_seqs 200    --gpu_memory_utilization 0.9    --max_model_len N    --dtype D
#
# A second call with the same model finds the servers running. Logs and pid files are in .servers/, or $BATON_SERVERS.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

servers=${BATON_SERVERS:-$BATON_ROOT/.servers}

# Prints when process $1 started, in clock ticks; nothing if it has ended. A pid alone may be another's by now.
start_time() {
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  read -ra fields <<<"${stat##*) }"
  [[ ${fields[0]} == Z ]] || echo "${fields[19]}" # dead, but not yet buried by its parent
}

# Succeeds while the server process on port $1 is alive.
is_alive() {
  local pid started
  [[ -f $servers/$1.pid ]] && read -r pid started <"$servers/$1.pid" && [[ $(start_time "$pid") == "$started" ]]
}

# Succeeds when something on host $1, port $2 answers /health as a ready server does.
is_ready() {
  local connection answer=""
  { exec {connection}<>"/dev/tcp/${1/#0.0.0.0/127.0.0.1}/$2"; } 2>/dev/null || return 1
  printf 'GET /health HTTP/1.0\r\nHost: %s\r\n\r\n' "$1" >&"$connection"
  read -r -t 5 answer <&"$connection" || true
  exec {connection}>&-
  [[ $answer == *" 200 "* ]]
}

# Prints the ports of the servers that were started here.
known_ports() {
  local file
  for file in "$servers"/*.pid; do
    if [[ -f $file ]]; then basename "$file" .pid; fi
  done
}

# Prints one line about the server on port $1.
show() {
  local pid host model state=starting
  read -r pid _ <"$servers/$1.pid"
  read -r host model <"$servers/$1.what"
  if ! is_alive "$1"; then
    state=dead
  elif is_ready "$host" "$1"; then
    state=ready
  fi
  printf 'port %s  pid %s  %-8s  %s  log %s\n' "$1" "$pid" "$state" "$model" "$servers/$1.log"
}

# Ends the process group of the server on port $1; by force what has not gone after 20 s.
stop_server() {
  local pid started attempt
  if [[ -f $servers/$1.pid ]]; then
    read -r pid started <"$servers/$1.pid"
    # No process, or the same one: then the group, if there still is one, is the server's.
    if [[ -z $(start_time "$pid") || $(start_time "$pid") == "$started" ]]; then
      kill -TERM -- "-$pid" 2>/dev/null || true
      for ((attempt = 0; attempt < 80; attempt++)); do
        kill -0 -- "-$pid" 2>/dev/null || break
        sleep 0.25
      done
      kill -KILL -- "-$pid" 2>/dev/null || true
    fi
  fi
  rm -f "$servers/$1.pid" "$servers/$1.what"
}

# Starts a server on port $1 with GPUs $2 (`cpu` for none), in a session and process group of its own.
start_server() {
  local pid
  pid=$(
    if [[ $2 != cpu ]]; then export CUDA_VISIBLE_DEVICES=$2; fi
    # shellcheck disable=SC2016  # the inner shell is to expand them
    # The substitution ends when the server's output goes to the log, so by then the pid is known.
    in_env inference setsid --fork bash -c 'echo "$$"; exec "${@:2}" >"$1" 2>&1 </dev/null' bash "$servers/$1.log" \
      python -m vllm.entrypoints.openai.api_server --model "$model" --host "$host" --port "$1" \
      --tensor-parallel-size "$tensor_parallel_size" --disable-uvicorn-access-log "${vllm_options[@]}"
  )
  echo "$pid $(start_time "$pid")" >"$servers/$1.pid"
  echo "$host $model" >"$servers/$1.what"
}

# Ends the servers that this call started, and the script with the log of the one on port $1: give_up PORT REASON
give_up() {
  local place
  say "port $1: $2; the end of $servers/$1.log:"
  tail -n 15 "$servers/$1.log" >&2
  for place in "${started[@]}"; do stop_server "$place"; done
  exit 1
}

# Ends the script unless option $1 has a positive number for its value.
check_positive() {
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "--$1 must be a positive number, not '${!1}'"
}

model="" num_servers="" port=8000 host=127.0.0.1 timeout=1800 tensor_parallel_size=1 action=start
max_num_seqs=200 gpu_memory_utilization=0.9 vllm_options=()
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --status | --stop) action=${1#--}; shift ;;
    --) shift; vllm_options+=("$@"); break ;;
    --num_servers | --port | --host | --timeout | --tensor_parallel_size | --max_num_seqs | --gpu_memory_utilization)
      (($# > 1)) || die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2 ;;
    --max_model_len) vllm_options+=(--max-model-len "${2?--max_model_len needs a value}"); shift 2 ;;
    --dtype) vllm_options+=(--dtype "${2?--dtype needs a value}"); shift 2 ;;
    --api_key) export VLLM_API_KEY=${2?--api_key needs a value}; shift 2 ;;
    -*) die "unknown option '$1'; --help lists them, and what is meant for vLLM stands after --" ;;
    *) [[ -z $model ]] || die "one model at a time, got '$model' and '$1'"; model=$1; shift ;;
  esac
done

mapfile -t known < <(known_ports)
if [[ $action == status ]]; then
  for place in "${known[@]}"; do show "$place"; done
  ((${#known[@]})) || echo "no servers"
  exit 0
elif [[ $action == stop ]]; then
  for place in "${known[@]}"; do stop_server "$place" & done
  wait
  echo "stopped: ${known[*]:-none}"
  exit 0
fi

[[ -n $model ]] || { usage >&2; die "which model?"; }
if [[ -e $model || $model == [./~]* ]]; then
  [[ -f $model/config.json ]] || die "$model: no config.json there, so it holds no model"
  model=$(realpath "$model")
fi
mapfile -t gpus < <(gpu_ids)
for number in port timeout tensor_parallel_size max_num_seqs; do check_positive "$number"; done
default=$((${#gpus[@]} / tensor_parallel_size))
num_servers=${num_servers:-$((default ? default : 1))}
check_positive num_servers
if ((${#gpus[@]})); then
  ((num_servers * tensor_parallel_size <= ${#gpus[@]})) ||
    die "$num_servers servers of $tensor_parallel_size GPUs each, but there are ${#gpus[@]} GPUs"
else
  ((tensor_parallel_size == 1)) || die "--tensor_parallel_size $tensor_parallel_size, but there is no GPU"
  # The servers share the cores; no thread is bound to a core or spins. Each engine is one process: as two, the one would spin
  # while the other works. Statistics, which bare vLLM does not count either, would cost a tenth of the speed.
  threads=$(($(nproc) / num_servers))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))} OMP_WAIT_POLICY=passive
  export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
  export VLLM_ENABLE_V1_MULTIPROCESSING=0
  vllm_options=(--enforce-eager --distributed-executor-backend uni --disable-log-stats "${vllm_options[@]}")
fi
vllm_options=(--max-num-seqs "$max_num_seqs" --gpu-memory-utilization "$gpu_memory_utilization" "${vllm_options[@]}")
export VLLM_NO_USAGE_STATS=1

mkdir -p "$servers"
started=()
for ((index = 0; index < num_servers; index++)); do
  place=$((port + index))
  if is_alive "$place"; then
    read -r _ running <"$servers/$place.what"
    [[ $running == "$model" ]] || die "port $place already serves $running; --stop ends it"
    continue
  fi
  stop_server "$place" # what a dead server left behind
  ! is_ready "$host" "$place" || die "port $place is taken by a server that was not started here; choose another --port"
  devices=cpu
  if ((${#gpus[@]})); then
    devices=$(IFS=,; echo "${gpus[*]:index * tensor_parallel_size:tensor_parallel_size}")
  fi
  start_server "$place" "$devices"
  started+=("$place")
done

if ((${#started[@]})); then say "$model: servers to start: ${#started[@]}; it may take minutes; logs: $servers/PORT.log"; fi
for ((place = port; place < port + num_servers; place++)); do
  until is_ready "$host" "$place"; do
    for other in "${started[@]}" "$place"; do
      is_alive "$other" || give_up "$other" "the server has ended"
    done
    ((SECONDS < timeout)) || give_up "$place" "not ready after $timeout s"
    sleep 0.5
  done
  show "$place"
done
