"""Benchmark lm-eval: requests per second of megagrow's model and of lm-eval's Hugging Face model.

    python tools/benchmarks/evaluation/speed.py CHECKPOINT TOKENIZER DATA_DIR [LIMIT] [BATCH_SIZE]

Both answer the same requests with the same weights in fp32, alternating, twice each. Prints the
better time of each, and the largest difference of a log-likelihood or the number of generated texts
that differ.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagrow.evaluation.lm import MegagrowLM
from megagrow.evaluation.tasks import load_tasks
from megagrow.offline.convert import export_hugging_face
from megagrow.offline.request import Request

TASKS = ("lambada_openai", "logiqa", "wikitext")
GENERATION = {"max_gen_toks": 128, "until": []}
"""Options of the generated texts, which continue the contexts of the first task."""


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


def timed(model: Any, requests: list[Instance]) -> tuple[float, list[Any]]:
    """Return the seconds of all requests, and the log-likelihoods or texts."""
    begin = time.perf_counter()
    answers = getattr(model, requests[0].request_type)(requests)
    seconds = time.perf_counter() - begin
    return seconds, [one[0] if isinstance(one, tuple) else one for one in answers]


def compare(ours: Any, theirs: Any, name: str, requests: list[Instance]) -> None:
    """Measure both models and print one line."""
    runs = [(timed(ours, requests), timed(theirs, requests)) for _ in range(2)]
    speeds = [len(requests) / min(run[i][0] for run in runs) for i in range(2)]
    (_, own), (_, other) = runs[0]
    pairs = list(zip(own, other, strict=True))
    if isinstance(own[0], str):
        difference = f"{sum(a != b for a, b in pairs)} texts"
    else:
        difference = f"{max(abs(a - b) for a, b in pairs):.1e}"
    print(f"{name}: ours {speeds[0]:.2f}/s, hf {speeds[1]:.2f}/s, difference {difference}")


def main(
    checkpoint: str, tokenizer: str, data_dir: str, limit: str = "100", batch: str = "16"
) -> None:
    """Measure and print one line per kind of requests."""
    ours = MegagrowLM(checkpoint, tokenizer, dtype="float32", batch_size=batch)
    theirs = exported(Path(checkpoint), Path(tokenizer), int(batch))
    tasks = load_tasks(TASKS, Path(data_dir))
    for name, task in tasks.items():
        task.build_all_requests(limit=int(limit), rank=0, world_size=1)
        compare(ours, theirs, name, task.instances)
    contexts = [request.args[0] for request in tasks[TASKS[0]].instances]
    generated = [
        Instance("generate_until", {}, (context, GENERATION), number)
        for number, context in enumerate(contexts)
    ]
    compare(ours, theirs, f"generation after {TASKS[0]}", generated)


if __name__ == "__main__":
    main(*sys.argv[1:])
