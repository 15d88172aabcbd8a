#!/usr/bin/env bash
# The demo on two CPU ranks: text, a model grown in the middle of its run, the same from scratch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu     # the same everywhere, also beside a GPU
export OMP_NUM_THREADS=$((($(nproc) + 1) / 2))        # two ranks share the cores

train() {
    deepspeed --log_level error --num_gpus 2 --module megagrow train "$1"
}

echo "1/4  real text: the sources of Python's standard library"
megagrow prepare python-stdlib --output data/stdlib --tokenizer train --vocab-size 2048

echo "2/4  2 layers, stacked to 8 in the middle of the run"
train configs/demo/gstack.yaml

echo "3/4  the same 8 layers from scratch, on as many FLOPs"
train configs/demo/scratch.yaml

echo "4/4  what growing has gained"
megagrow report runs/demo/gstack runs/demo/scratch --output runs/demo
