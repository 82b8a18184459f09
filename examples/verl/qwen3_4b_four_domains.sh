#!/usr/bin/env bash
# Starts the run of conf/qwen3_4b_four_domains.yaml on 8 GPUs; further arguments are Hydra overrides:
#   examples/verl/qwen3_4b_four_domains.sh guard.budget=0.05 trainer.nnodes=2
# The same without the guard: actor_rollout_ref.model.external_lib=null
#
# Before it, once:
#   python examples/trl/prepare.py public --out data/public --writing NAME_OF_A_CREATIVE_WRITING_SET
#   python examples/verl/prepare.py data/public data/verl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec python -m verl.trainer.main_ppo --config-path "$PWD/examples/verl/conf" --config-name qwen3_4b_four_domains "$@"
