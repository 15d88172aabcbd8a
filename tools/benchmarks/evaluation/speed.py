"""Benchmark lm-eval: requests per second of megagrow's model and of lm-eval's Hugging Face model.

    python tools/benchmarks/evaluation/speed.py CHECKPOINT TOKENIZER DATA_DIR [LIMIT] [BATCH_SIZE]

Both score the same requests with the same weights in fp32, alternating, twice each. Prints the
better time of each and the largest difference of a log-likelihood.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagrow.evaluation.lm import MegagrowLM
from megagrow.evaluation.tasks import load_tasks
from megagrow.offline.convert import export_hugging_face
from megagrow.offline.request import Request

TASKS = ("lambada_openai", "logiqa", "wikitext")


def exported(checkpoint: Path, tokenizer: Path, batch_size: int) -> HFLM:
    """Export a checkpoint and load it as lm-eval's Hugging Face model."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        request = Request(
            source=checkpoint,
            out=out,
            form="huggingface",
            memory="2GiB",
            tokenizer=str(tokenizer),
        )
        export_hugging_face(request, Console(quiet=True))
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
        texts = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    return HFLM(pretrained=model, tokenizer=texts, batch_size=batch_size)


def timed(model: Any, task: Any) -> tuple[float, list[float]]:
    """Return the seconds of all requests of a task, and the log-likelihoods."""
    begin = time.perf_counter()
    answers = getattr(model, task.instances[0].request_type)(task.instances)
    seconds = time.perf_counter() - begin
    return seconds, [one[0] if isinstance(one, tuple) else one for one in answers]


def main(
    checkpoint: str, tokenizer: str, data_dir: str, limit: str = "100", batch: str = "16"
) -> None:
    """Measure and print one line per task."""
    ours = MegagrowLM(checkpoint, tokenizer, dtype="float32", batch_size=batch)
    theirs = exported(Path(checkpoint), Path(tokenizer), int(batch))
    for name, task in load_tasks(TASKS, Path(data_dir)).items():
        task.build_all_requests(limit=int(limit), rank=0, world_size=1)
        runs = [(timed(ours, task), timed(theirs, task)) for _ in range(2)]
        speeds = [len(task.instances) / min(run[i][0] for run in runs) for i in range(2)]
        (_, own), (_, other) = runs[0]
        difference = max(abs(a - b) for a, b in zip(own, other, strict=True))
        print(f"{name}: ours {speeds[0]:.2f}/s, hf {speeds[1]:.2f}/s, difference {difference:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
