"""One rank of one contestant of run.py, which starts it as a launcher does."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from megagrow.parallel.launch import read_launch  # noqa: E402
from tools.benchmarks.training.gate import Case, Gate  # noqa: E402


def main() -> None:
    """Trains the case that the first argument holds."""
    case = Case.from_json(json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    rank = read_launch().rank
    name = case.contestant.split(":")[0]
    if name.startswith("ours"):
        from tools.benchmarks.training.ours import Clock, train_own, watch_parts

        clock = Clock()
        if name == "ours, timed":
            watch_parts(clock)
        train_own(case, Gate(case, rank, clock.read))
    elif name.startswith("Trainer"):
        from tools.benchmarks.training.trainer import train_with_trainer

        train_with_trainer(case, Gate(case, rank), deepspeed=name.endswith("DeepSpeed"))
    else:
        from tools.benchmarks.training.loops import plain_loop

        makes = {"loop, our model": "own", "loop, HF model": "hugging_face"}
        plain_loop(case, Gate(case, rank), makes.get(name, "litgpt"), rank)


if __name__ == "__main__":
    main()
