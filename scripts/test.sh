#!/usr/bin/env bash
# Sets up what is missing, then runs the tests, each in the environment whose code it checks.
# usage: bash scripts/test.sh [pytest arguments]   for example: bash scripts/test.sh tests/contract -k shards
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$BATON_ROOT"

# The environments that each folder of tests runs in.
declare -A owners=(
  [contract]=training [models]="inference training" [inference]=inference [training]=training [end_to_end]=training
)

# Adds path $2 of the folder tests/$1 to what runs in each of the folder's environments.
select_path() {
  local name
  for name in ${owners[$1]}; do paths[$name]+="$2"$'\n'; done
}

# Arguments that begin with tests/ are paths and choose the environments; all others go to pytest in both.
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
  [[ -n ${owners[$part]:-} ]] || die "no environment owns tests/$part; they own: ${!owners[*]}"
  select_path "$part" "$argument"
done
if [[ -z ${paths[inference]}${paths[training]} ]]; then
  for part in end_to_end contract training inference models; do  # the longest file first: it then runs beside all others
    if [[ -d tests/$part ]]; then select_path "$part" "tests/$part"; fi
  done
fi

bash scripts/setup_envs.sh

logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
colour=no
if [[ -t 1 ]]; then colour=yes; fi
# Four test files at once, and each program on one thread: much of a test's time is start-up, which one core does, or waiting.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
code=5   # pytest's «no tests collected»: the verdict unless an environment finds some
for name in inference training; do
  if [[ -z ${paths[$name]} ]]; then continue; fi
  mapfile -t selected <<<"${paths[$name]%$'\n'}"
  echo "== tests in the $name environment: ${selected[*]}"
  result=0
  in_env "$name" python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder "--color=$colour" "${selected[@]}" "${options[@]}" |
    tee "$logs/$name" || result=$?
  if ((result != 5 && (code == 5 || code == 0))); then code=$result; fi
done

echo "== result"
for log in "$logs"/*; do printf '%-10s %s\n' "$(basename "$log")" "$(grep . "$log" | tail -n 1)"; done
exit "$code"
