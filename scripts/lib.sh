# shellcheck shell=bash
# Functions that every script shares. Source this file: it defines names and runs nothing.

# With CDPATH set, `cd` may go to another folder, and prints it.
BATON_ROOT="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# The folder that holds the environments inference/ and training/.
BATON_ENVS="${BATON_ENVS:-$BATON_ROOT/.envs}"
[[ $BATON_ENVS == /* ]] || BATON_ENVS=$PWD/$BATON_ENVS

# Ends the script with a message and exit code 2: bad arguments or input.
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# Prints a line of progress to stderr, after the time of day.
say() {
  printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2
}

# Ends the script unless file $1 is a recipe that a shell can read.
check_recipe() {
  local near
  for near in "$1.env" "$BATON_ROOT/configs/recipes/$(basename "$1" .env).env"; do
    [[ -f $1 || ! -f $near ]] || die "$1: no such recipe; did you mean $near?"
  done
  [[ -f $1 ]] || die "$1: no such recipe; configs/recipes/ has $(cd "$BATON_ROOT/configs/recipes" && echo *.env)"
  ! LC_ALL=C grep -q -e $'\r$' -e $'^\xef\xbb\xbf' "$1" ||
    die "$1: has Windows line ends or a byte order mark; sed -i '1s/^\xef\xbb\xbf//; s/\r\$//' '$1' takes them away"
}

# The trap while recipe $recipe is read; the shell may just have said what stopped it. A recipe that fails is bad input.
recipe_stopped() {
  die "${recipe:?the caller sets it}: the shell stopped in it, or its last line is a test that failed; a recipe is a shell file of lines" \
    "VARIABLE=value, without blanks around ="
}

# Ends the script for a folder $1 where programs would take a path of a file for two.
check_path() {
  [[ $1 != *,* ]] || die "$1: a comma stands between the files that a program reads: give another --run_dir, without one"
}

# Ends the script unless folder $1 is there or can be made, and can be written to, and has a path that programs take.
check_folder() {
  local place=$1
  check_path "$1"
  until [[ -e $place ]]; do place=$(dirname "$place"); done
  [[ -d $place && -w $place ]] ||
    die "$1: cannot be written, because $place is no folder that you may write to: give another --run_dir"
}

# Succeeds where environment $1 is installed, and not half installed.
has_env() {
  [[ -x $BATON_ENVS/$1/bin/python && ! -e $BATON_ENVS/.$1.unfinished ]]
}

# Prints cpu or cuda: what environment $1 is made for, or is being made for. Prints nothing where there is none.
env_device() {
  local word=""
  read -r word 2>/dev/null <"$BATON_ENVS/.$1.unfinished" || true
  [[ -n $word ]] || { read -r && read -r word _; } 2>/dev/null <"$BATON_ENVS/$1/baton.stamp" || true
  [[ ! $word =~ ^(cpu|cuda)$ ]] || echo "$word"
}

# Runs a command in an environment without activating it: in_env inference|training COMMAND [ARGUMENT ...]
# Packages are installed uncompiled, so programs may keep what Python compiles at the first import, though container images
# often forbid it: to compile all of it in every program takes more than half of the time that it needs to start.
# Where the environment is missing it returns 2: to exit would close the terminal of a user who has sourced this file.
in_env() {
  local name=$1 prefix=VIRTUAL_ENV
  shift
  [[ $name =~ ^(inference|training)$ ]] || (die "no environment '$name'; there are inference and training") || return
  has_env "$name" ||
    (die "the $name environment is missing in $BATON_ENVS: run bash scripts/setup_envs.sh") || return
  [[ ! -d $BATON_ENVS/$name/conda-meta ]] || prefix=CONDA_PREFIX
  env -u PYTHONHOME -u PYTHONDONTWRITEBYTECODE -u VIRTUAL_ENV -u CONDA_PREFIX "$prefix=$BATON_ENVS/$name" PYTHONNOUSERSITE=1 \
    PATH="$BATON_ENVS/$name/bin:$PATH" PYTHONPATH="$BATON_ROOT${PYTHONPATH:+:$PYTHONPATH}" "$@"
}

# Prints the GPUs that may be used, on one line: those in CUDA_VISIBLE_DEVICES where it is set, else all of the machine; none
# where the environments are made for the CPU.
gpu_ids() {
  in_env inference python -m baton.launch gpus
}

# The words of stages that have not run yet: of each their number, and the words of `python -m baton.launch run`.
stages=()

# Adds a stage of the run in $run_dir, its output in a log of its own, to those that run_stages runs.
# stage NAME inference|training [OPTION ...] PROGRAM [ARGUMENT ...]
stage() {
  local command=(--name "$1" --environment "$2" --log "${run_dir:?the caller sets it}/logs/$1.log" "${@:3}")
  stages+=("${#command[@]}" "${command[@]}")
}

# Ends script $0, which has no --overwrite, with the exit code $1 of stages that failed.
stages_failed() {
  (($1 != 2)) || say "($(basename "$0") has no --overwrite: give another --run_dir, or what this run was begun with)"
  exit "$1"
}

# Runs the stages in turn, those that follow each other in one environment in one process; returns the exit code of the first
# that fails, after the end of its log. What was started ends with the script, even if that is killed.
run_stages() {
  local added=("${stages[@]}")
  stages=()
  ((${#added[@]} == 0)) || BATON_PARENT=$$ in_env training python -m baton.launch chain < <(printf '%s\0' "${added[@]}")
}
