#!/usr/bin/env bash
# No test: samples K responses to every prompt, on all GPUs of the machine (or on its CPU), and merges the shards.
# usage: bash scripts/test_gen.sh --model_name_or_path MODEL --dataset_name_or_path PROMPTS --output_dir ./data/gen_data [--K 4 …]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

BATON_PARENT=$$ in_env inference python "$BATON_ROOT/generation/run_shards.py" "$@"
