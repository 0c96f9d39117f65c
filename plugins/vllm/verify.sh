#!/usr/bin/env bash
# Installs the plugin into an environment that has vLLM, and runs its tests there (4 minutes on two
# cores): verify.sh [PYTHON]. HEED_STUDENTS="out/c4 out/c6" tries trained students.
set -euo pipefail
python=$(command -v "${1:-python}")
cd "$(dirname "$0")/../.."
"$python" -m pip install -q ./plugins/vllm pytest
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$python" -m pytest -q tests/test_vllm.py
