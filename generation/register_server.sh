#!/usr/bin/env bash
# Starts one vLLM server per GPU (on CPU: --num_servers) and returns once all of them answer, or says why one does not.
# usage: bash generation/register_server.sh MODEL [options] [-- options of vLLM]
#        bash generation/register_server.sh --status | --stop | --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"

BATON_PARENT=$$ in_env inference python "$BATON_ROOT/generation/register_server.py" "$@"
