"""One rank of one configuration of run.py, which sets the launcher variables."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from megagrow.parallel.launch import read_launch  # noqa: E402
from tools.benchmarks.training.gate import Gate, TrainingCase  # noqa: E402


def main() -> None:
    """Train the case in the first argument."""
    case = TrainingCase.from_json(json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    rank = read_launch().rank
    name = case.configuration.split(":")[0]
    if name.startswith("ours"):
        from tools.benchmarks.training.ours import PartTimer, time_parts, train_own

        timer = PartTimer()
        if name == "ours, timed":
            time_parts(timer)
        train_own(case, Gate(case, rank, timer.read))
    elif name.startswith("Trainer"):
        from tools.benchmarks.training.trainer import train_with_trainer

        train_with_trainer(case, Gate(case, rank), deepspeed=name.endswith("DeepSpeed"))
    else:
        from tools.benchmarks.training.loops import plain_loop

        models = {"loop, our model": "own", "loop, HF model": "hugging_face"}
        plain_loop(case, Gate(case, rank), models.get(name, "litgpt"), rank)


if __name__ == "__main__":
    main()
