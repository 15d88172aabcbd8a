"""lm-eval's Hugging Face model of the exported checkpoint, as the reference for the adapter."""

import json
from functools import cache
from pathlib import Path

from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from megagrow.data.sentencepiece_tokenizer import train_sentencepiece
from megagrow.evaluation.lm import LMAdapter, MegagrowLM
from megagrow.evaluation.runner import evaluate
from megagrow.evaluation.tasks import load_tasks
from megagrow.offline.convert import export_hugging_face
from megagrow.offline.request import Request
from megagrow.parallel.sharding import parameter_plan
from tests.helpers.checkpoint.written import write_checkpoint
from tests.helpers.evaluation.folders import DATA
from tests.helpers.hugging_face import hugging_face, state_of, tiny
from tests.helpers.reshard.models import layout_of

LIMITS = {"lambada_openai": 24, "logiqa": 10, "wikitext": 2}
CONFIG = tiny(vocab_size=509, num_key_value_heads=2, max_position_embeddings=192)
"""Questions and articles exceed its context; two ranks have vocabulary shards of unequal size."""

BATCH = 7


def write_source(folder: Path) -> tuple[Path, Path]:
    """Write a ZeRO-3 checkpoint with random weights and a tokenizer trained on LAMBADA."""
    lines = (DATA / "lambada" / "lambada_test.jsonl").read_text().split("\n")[:300]
    tokenizer = folder / "tokenizer.model"
    train_sentencepiece([json.loads(line)["text"] for line in lines], 500, tokenizer)
    state = state_of(hugging_face(CONFIG), parameter_plan(CONFIG, 1))
    layout = layout_of(CONFIG, 3, 2, 2)
    return write_checkpoint(folder / "step-5", CONFIG, layout, state), tokenizer


def theirs(folder: Path, checkpoint: Path, tokenizer: Path) -> HFLM:
    """Build lm-eval's Hugging Face model of the exported checkpoint."""
    request = Request(
        source=checkpoint,
        out=folder / "out",
        form="huggingface",
        memory="512MiB",
        tokenizer=str(tokenizer),
    )
    export_hugging_face(request, Console(quiet=True))
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder / "out"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "out"),
        batch_size=BATCH,
    )


def ours(checkpoint: Path, tokenizer: Path, tp: int) -> LMAdapter:
    """Build the adapter on all launched ranks."""
    return MegagrowLM(str(checkpoint), str(tokenizer), tp, batch_size=BATCH)


@cache
def tasks() -> dict:
    """Return the tasks with local data, by name."""
    return load_tasks(tuple(LIMITS), DATA)


def answers(model: object) -> dict[str, list]:
    """Return the model's answers to the requests of each task."""
    by_task = {}
    for name, task in tasks().items():
        task.build_all_requests(limit=LIMITS[name], rank=0, world_size=1)
        kind = task.instances[0].request_type
        by_task[name] = getattr(model, kind)(task.instances)
    return by_task


def figures(model: object) -> dict[str, dict]:
    """Return the metrics of each task on a few documents."""
    return {
        name: evaluate(model, {name: tasks()[name]}, limit)["results"][name]
        for name, limit in LIMITS.items()
    }
