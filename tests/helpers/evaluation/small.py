"""Tiny local tasks, a tokenizer, and a run that is evaluated on them."""

import json
import random
from pathlib import Path
from typing import Any

from megagrow.config.schema import RunConfig
from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from tests.helpers.runs import MODEL, STEP_TOKENS, make_run, parallel_of

SMALL = MODEL | {"vocab_size": 301}
HYBRID = SMALL | {"model_type": "samba", "sliding_window": 6}
"""Mamba, then attention in a window that is shorter than most texts."""
TASKS = ["lambada_openai", "piqa", "wikitext"]
DOCUMENTS = 5
"""Two on one data-parallel rank, three on the other."""
BATCH = 2
LAYOUTS = (parallel_of(3, 1), parallel_of(1, 2, sequence_parallel=True))
_PIPELINE = {"pipeline_model_parallel_size": 2}
PIPELINES = (_PIPELINE, _PIPELINE | {"virtual_pipeline_model_parallel_size": 2})


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return texts of random words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abdeiklnorst", k=draw.randint(2, 6))) for _ in range(60)]
    return [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(count)]


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write the tasks' data and a tokenizer; return both paths."""
    texts = sentences(60)
    tokenizer = folder / "tokenizer.model"
    train_sentencepiece(texts, 300, tokenizer)
    choices = [{"goal": a, "sol1": b, "sol2": c, "label": len(b) % 2}
               for a, b, c in zip(texts, texts[20:], texts[40:], strict=False)]  # fmt: skip
    docs = {
        "lambada_openai": [{"text": text} for text in texts],
        "piqa": choices,
        "wikitext": [{"page": "\n".join(texts[i : i + 6])} for i in range(0, 60, 6)],
    }
    for task, documents in docs.items():
        (folder / "data" / task).mkdir(parents=True)
        lines = [json.dumps(doc) + "\n" for doc in documents]
        (folder / "data" / task / "test.jsonl").write_text("".join(lines))
    return folder / "data", tokenizer


def evaluated_run(
    folder: Path,
    data: Path,
    tokenizer: Path,
    model: dict[str, Any] = SMALL,
    layouts: tuple[dict[str, Any], dict[str, Any]] = LAYOUTS,
    **changes: Any,
) -> RunConfig:
    """Return a run that trains a base and grows it, on two ranks; evaluated and saved every second
    step."""
    batch = {"global_batch_size": 4, "micro_batch_size": 2}
    base = {"model": model, "tokens": 3 * STEP_TOKENS, "parallel": layouts[0]}
    grown = {
        "model": model | {"num_hidden_layers": 4},
        "tokens": 3 * STEP_TOKENS,
        "parallel": layouts[1],
        "growth": {"operator": "direct_depth"},
    }
    evaluation = {"interval": 2, "tasks": TASKS, "data_dir": data, "limit": DOCUMENTS}
    sections = {
        "checkpoint": {"interval": 2, "keep_last": 10},
        "evaluation": evaluation | {"batch_size": BATCH},
    }
    stages = [base | {"batch": batch}, grown | {"batch": batch}]
    run = make_run(folder, stages, **(sections | changes))
    named = run.data.model_copy(update={"tokenizer": tokenizer})
    return run.model_copy(update={"data": named})
