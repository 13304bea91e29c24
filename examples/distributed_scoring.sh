#!/usr/bin/env bash
# Score on several processes, then plan and cut for any budget without scoring again.
#
#   PROCESSES=2 ./examples/distributed_scoring.sh [model] [further options of the command]
#
# Each process scores its share of the examples. The scores are the same as those of one process.
# On a machine without a GPU the processes share its cores; torchrun is used there, as
# `accelerate launch --cpu` starts a single process unless MPI is set up.
set -euo pipefail

MODEL="${1:-quickstart}"
shift || true
PROCESSES="${PROCESSES:-2}"
OUTPUT="${OUTPUT:-./distributed}"
SCORES="$OUTPUT.scores.safetensors"

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  LAUNCH=(accelerate launch --multi_gpu --num_processes "$PROCESSES" -m)
else
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  LAUNCH=(torchrun --standalone --nproc_per_node "$PROCESSES" -m)
fi

# Once, on all processes. A broken-off run goes on from its scores file.
"${LAUNCH[@]}" hf_gradnas.prune --model "$MODEL" --target flops=60% \
  --output "$OUTPUT" --save-scores "$SCORES" "$@"

# Any other budget: seconds, on one process. The quickstart model was trained by the first command.
if [ "$MODEL" = quickstart ]; then
  MODEL="$OUTPUT.quickstart/model"
  set -- --dataset "$OUTPUT.quickstart/train.txt" "$@"
fi
python -m hf_gradnas.prune --model "$MODEL" --target flops=40% \
  --output "$OUTPUT-40" --scores "$SCORES" "$@"
