#!/usr/bin/env bash
# Sets up what is missing, then runs the tests, each in the environment whose code it checks.
# usage: bash scripts/test.sh [pytest arguments]   for example: bash scripts/test.sh tests/contract -k shards
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$BATON_ROOT"

declare -A owner=([contract]=training [inference]=inference [training]=training [end_to_end]=training)

# Arguments that begin with tests/ are paths and choose the environment; all others go to pytest in both.
declare -A paths=([inference]="" [training]="")
options=() previous=""
for argument in "$@"; do
  argument=${argument#./}
  argument=${argument#"$BATON_ROOT/"}
  if [[ $argument != tests && $argument != tests/?* || $previous =~ ^--(deselect|ignore)$ ]]; then
    options+=("$argument")
    previous=$argument
    continue
  fi
  [[ -e ${argument%%::*} ]] || die "there is no ${argument%%::*}"
  part=${argument#tests}
  part=${part#/}
  part=${part%%[/:]*}
  if [[ -z $part ]]; then continue; fi
  [[ -n ${owner[$part]:-} ]] || die "no environment owns tests/$part; they own: ${!owner[*]}"
  paths[${owner[$part]}]+="$argument"$'\n'
done
if [[ -z ${paths[inference]}${paths[training]} ]]; then
  for part in contract training end_to_end inference; do
    if [[ -d tests/$part ]]; then paths[${owner[$part]}]+="tests/$part"$'\n'; fi
  done
fi

bash scripts/setup_envs.sh

# Runs pytest in environment $1 on the paths that it owns.
run_tests() {
  local selected
  mapfile -t selected <<<"${paths[$1]%$'\n'}"
  echo "== tests in the $1 environment: ${selected[*]}"
  in_env "$1" python -m pytest "--color=$colour" "${selected[@]}" "${options[@]}"
}

logs="$(mktemp -d)"
colour=no
if [[ -t 1 ]]; then colour=yes; fi
# Both environments at once, and each program on one thread: most of a test's time is start-up, which one core does.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
declare -A running=()
trap 'kill "${running[@]}" 2>/dev/null || true; rm -rf "$logs"' EXIT
for name in training inference; do
  if [[ -n ${paths[$name]} ]]; then
    run_tests "$name" >"$logs/$name" 2>&1 &
    running[$name]=$!
  fi
done
code=5   # pytest's «no tests collected»: the verdict unless an environment finds some
for name in training inference; do
  [[ -n ${running[$name]:-} ]] || continue
  tail -n +1 -f --pid="${running[$name]}" "$logs/$name"
  result=0
  wait "${running[$name]}" || result=$?
  unset "running[$name]"
  if ((result != 5 && (code == 5 || code == 0))); then code=$result; fi
done

echo "== result"
for log in "$logs"/*; do printf '%-10s %s\n' "$(basename "$log")" "$(grep . "$log" | tail -n 1)"; done
exit "$code"
