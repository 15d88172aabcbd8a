"""Export a checkpoint to Hugging Face, compare its loss in transformers, and evaluate both.

Needs the extras `hf` and `eval`: pip install 'megagrow[hf,eval]'. On the CPU of a laptop:

    python examples/train_and_grow.py            # once: writes runs/example/
    python examples/convert_and_evaluate.py      # under a minute; writes runs/example/exported/

The task has PIQA's format, two solutions per goal, and is read from a local file.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megagrow.api as mg

TEXT = "class Task:\n    def __init__(self, loop):\n        self._loop = loop\n"
QUESTIONS = [
    {"goal": "def __init__(self", "sol1": ", loop):", "sol2": "@@QX%%", "label": 0},
    {"goal": "    return self._", "sol1": "ZZ&&JW", "sol2": "loop", "label": 1},
    {"goal": "if not isinstance(", "sol1": "^^YK##", "sol2": "self, loop):", "label": 1},
]


def main() -> None:
    """Export, compare the loss on a text between both implementations, evaluate both models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--example", type=Path, default=Path("runs/example"))
    folder = parser.parse_args().example
    run, exported = folder / "run", folder / "exported"
    if not exported.exists():
        mg.export_hugging_face(run, exported)

    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)(
        TEXT, add_special_tokens=False, return_tensors="pt"
    )
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False)
    with torch.no_grad():
        theirs = model(tokens.input_ids, labels=tokens.input_ids).loss.item()
    ours = mg.text_loss(run, text, folder / "corpus" / "tokenizer.model")
    print(f"loss | megagrow {ours:.5f} | transformers {theirs:.5f}")

    (folder / "tasks" / "piqa").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (folder / "tasks" / "piqa" / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    for path in (run, exported):
        results = mg.evaluate(path, ["piqa"], data_dir=folder / "tasks")["results"]
        print(f"piqa | acc {results['piqa']['acc']:.3f} | {path}")


if __name__ == "__main__":
    main()
