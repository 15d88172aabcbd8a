#!/usr/bin/env bash
# Demo on two CPU ranks: prepare text, train and grow a model, train the same model from scratch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu     # use the CPU even if there is a GPU
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))        # two ranks share the cores

train() {
    deepspeed --log_level error --num_gpus 2 --module megagrow train "$1"
}

echo "1/5  prepare text: the sources of Python's standard library"
megagrow prepare python-stdlib --output data/stdlib --tokenizer train --vocab-size 2048

echo "2/5  train 2 layers, stacked to 8 in the middle of the run"
train configs/demo/gstack.yaml

echo "3/5  train the same 8 layers from scratch, with the same FLOPs"
train configs/demo/scratch.yaml

echo "4/5  compare both runs"
megagrow report runs/demo/gstack runs/demo/scratch --output runs/demo

echo "5/5  continue a prompt with both models"
for run in gstack scratch; do
    echo "--- $run"
    megagrow generate "runs/demo/$run" --prompt "def __init__(self" --max-tokens 48
done
