"""Grow a checkpoint file to file with three operators, and compare the losses on a text.

`zero_depth` and `net2net_width` preserve the function, so that the loss does not change;
`direct_depth` (Gstack) does not. On the CPU of a laptop:

    python examples/train_and_grow.py            # once: writes runs/example/
    python examples/grow_checkpoint.py           # under a minute; writes runs/example/grown/
"""

import argparse
import asyncio
from pathlib import Path

import yaml

import megagrow.api as mg

TARGETS = {
    "direct_depth": {"num_hidden_layers": 8},
    "zero_depth": {"num_hidden_layers": 8},
    "net2net_width": {"intermediate_size": 352},
}
"""Operator -> sizes of the model that change."""


def main() -> None:
    """Grow the newest checkpoint of the run by each operator and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--example", type=Path, default=Path("runs/example"))
    args = parser.parse_args()

    run = args.example / "run"
    model = mg.load_run(args.example / "run.yaml").stages[-1].model.model_dump()
    text = Path(asyncio.__file__)  # the license and the imports of a package that was trained on
    tokenizer = args.example / "corpus" / "tokenizer.model"
    (args.example / "grown").mkdir(exist_ok=True)

    print(f"{'source':13} | loss {mg.text_loss(run, text, tokenizer):.6f}")
    for operator, sizes in TARGETS.items():
        out = args.example / "grown" / operator
        target = out.with_suffix(".yaml")
        target.write_text(yaml.safe_dump(model | sizes), encoding="utf-8")
        if not out.exists():
            mg.grow(run, out, to=target, operators=[operator])
        print(f"{operator:13} | loss {mg.text_loss(out, text, tokenizer):.6f}")


if __name__ == "__main__":
    main()
