"""Train 2 layers, stack them to 4 in the middle of the run, and print the losses.

The corpus is the asyncio package of Python's standard library. On the CPU of a laptop:

    python examples/train_and_grow.py            # one to two minutes; writes runs/example/

Repeat the command to resume. `torchrun --nproc-per-node 2 -m megagrow train
runs/example/run.yaml` trains the same run on two ranks.
"""

import argparse
import asyncio
from pathlib import Path

import megagrow.api as mg

RUN = """
name: example
output_dir: {folder}/run
data:
  train: [{{path: {folder}/corpus/train}}]
  validation: [{{path: {folder}/corpus/validation}}]
  tokenizer: {folder}/corpus/tokenizer.model
  sequence_length: 128
batch: {{global_batch_size: 8, micro_batch_size: 4}}
optimizer: {{lr: 4e-3, min_lr: 4e-4}}
schedule: {{type: cosine, warmup_steps: 10}}
validation: {{interval: 20, tokens: 16K}}
stages:
  - model: &model {{num_hidden_layers: 2, hidden_size: 64, intermediate_size: 176,
      num_attention_heads: 4, vocab_size: 512, max_position_embeddings: 128}}
    tokens: {tokens}
  - model: {{<<: *model, num_hidden_layers: 4}}
    tokens: {tokens}
    growth: {{operator: direct_depth}}
"""


def main() -> None:
    """Prepare the corpus, write the run file, train, and print the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/example"))
    parser.add_argument("--tokens", type=int, default=128 * 1024, help="tokens of each stage")
    args = parser.parse_args()

    sources = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    mg.prepare(sources, args.output / "corpus", vocab_size=512, validation_fraction=0.1)
    run_file = args.output / "run.yaml"
    run_file.write_text(RUN.format(folder=args.output, tokens=args.tokens), encoding="utf-8")
    mg.train(mg.load_run(run_file))
    for record in mg.read_metrics(args.output / "run"):
        if record["kind"] == "validation":
            print(f"step {record['step']:4d} | validation loss {record['loss']:.3f}")
        elif record["kind"] == "growth":
            print(f"growth | loss {record['loss_before']:.3f} -> {record['loss_after']:.3f}")


if __name__ == "__main__":
    main()
