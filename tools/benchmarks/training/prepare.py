"""Tokenization speed of `megagrow prepare` and of `datasets.map` with the same tokenizer.

Each method runs in a separate process on the same number of cores, from a file of JSON lines to
tokens on disk. The times exclude imports and include the worker processes of the method. The
tokenizer library alone, from texts to ids in memory, bounds the speed of all methods.
"""

import json
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

ROUNDS = 3
ENCODER = "encoder alone"


def corpus_of(folder: Path, size: int, vocab_size: int) -> tuple[Path, Path]:
    """Write about `size` bytes of the standard library as JSON lines, and a corpus of them.

    Return the path of the text and the prefix of the corpus, which has its own tokenizer.
    """
    from rich.console import Console

    from megagrow.data.prepare import TRAIN_TOKENIZER, prepare

    text, output = folder / "text.jsonl", folder / "corpus"
    with text.open("w", encoding="ascii") as file:
        file.writelines(_json_lines(size))
    prepare([str(text)], output, TRAIN_TOKENIZER, vocab_size, 0, console=Console(quiet=True))
    return text, output / "train"


def prepare_speeds(text: Path, corpus: Path, folder: Path, cores: int) -> dict[str, Any]:
    """Return the median seconds of each method over `ROUNDS` rounds, or the missing packages."""
    if find_spec("datasets") is None:
        return {"not_installed": ["datasets"]}
    tokenizers = {"tokenizer.model": corpus / "tokenizer.model"}
    tokenizers["tokenizer.json"] = _byte_level(text, folder / "json")
    seconds: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for kind, tokenizer in tokenizers.items():
            for method in METHODS:
                if method == "datasets.map, sentencepiece" and kind == "tokenizer.json":
                    continue
                measurement = _measured(method, text, tokenizer, folder / "prepared", cores)
                seconds.setdefault((kind, method), []).append(measurement)
    return {
        "bytes": text.stat().st_size,
        "cores": cores,
        "methods": [
            {
                "tokenizer": kind,
                "method": method,
                "seconds": statistics.median(one["seconds"] for one in rounds),
                "cpu_seconds": statistics.median(one["cpu_seconds"] for one in rounds),
                "tokens": rounds[0]["tokens"],
            }
            for (kind, method), rounds in seconds.items()
        ],
    }


def by_megagrow(text: Path, tokenizer: Path, output: Path, cores: int) -> Callable[[], int]:
    """`megagrow prepare`; returns the number of tokens without end-of-document tokens."""
    from rich.console import Console

    from megagrow.data.prepare import prepare

    def run() -> int:
        manifest = prepare(
            [str(text)], output, str(tokenizer), None, 0, cores, console=Console(quiet=True)
        )
        return sum(split.tokens - split.documents for split in manifest.splits.values())

    return run


def by_datasets(text: Path, tokenizer: Path, output: Path, cores: int) -> Callable[[], int]:
    """`datasets.map` in batches with the tokenizer of transformers."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    if tokenizer.suffix == ".json":
        loaded: Any = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    else:
        loaded = LlamaTokenizer.from_pretrained(
            tokenizer.parent, legacy=False, trust_remote_code=False
        )

    def tokens_of(rows: dict[str, list[str]]) -> dict[str, Any]:
        options = {"add_special_tokens": False, "return_attention_mask": False}
        return {"input_ids": loaded(rows["text"], **options)["input_ids"]}

    return _mapped(text, output, cores, tokens_of)


def by_sentencepiece(text: Path, tokenizer: Path, output: Path, cores: int) -> Callable[[], int]:
    """`datasets.map` in batches with SentencePiece."""
    import sentencepiece

    model = tokenizer.read_bytes()
    processors: list[Any] = []

    def tokens_of(rows: dict[str, list[str]]) -> dict[str, Any]:
        if not processors:
            processors.append(sentencepiece.SentencePieceProcessor(model_proto=model))
        return {"input_ids": processors[0].encode(rows["text"], out_type=int, num_threads=1)}

    return _mapped(text, output, cores, tokens_of)


def by_library(text: Path, tokenizer: Path, output: Path, cores: int) -> Callable[[], int]:
    """Encoder of `tokenizers` or SentencePiece alone, as `prepare` calls it."""
    from megagrow.data.tokenizers import load_tokenizer

    with text.open(encoding="ascii") as file:
        texts = [json.loads(line)["text"] for line in file]
    encode = load_tokenizer(str(tokenizer)).encode_batch

    def encoded(worker: int) -> int:
        return sum(len(ids) for ids in encode(texts[worker::cores]))

    def run() -> int:
        context = multiprocessing.get_context("fork")
        counts = [context.SimpleQueue() for _ in range(cores)]

        def work(worker: int) -> None:
            counts[worker].put(encoded(worker))

        processes = [context.Process(target=work, args=(worker,)) for worker in range(cores)]
        for process in processes:
            process.start()
        total = sum(count.get() for count in counts)
        for process in processes:
            process.join()
        return total

    return run


METHODS = {
    ENCODER: by_library,
    "megagrow prepare": by_megagrow,
    "datasets.map, transformers": by_datasets,
    "datasets.map, sentencepiece": by_sentencepiece,
}


def main() -> None:
    """Measure one method with the arguments of `_measured`; print JSON."""
    method, text, tokenizer, output, cores = sys.argv[1:]
    run = METHODS[method](Path(text), Path(tokenizer), Path(output), int(cores))
    begin = time.perf_counter(), _cpu_seconds()
    tokens = run()
    spent = {"seconds": time.perf_counter() - begin[0], "cpu_seconds": _cpu_seconds() - begin[1]}
    print(json.dumps(spent | {"tokens": tokens}))


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its terminated children."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _measured(
    method: str, text: Path, tokenizer: Path, output: Path, cores: int
) -> dict[str, float]:
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    arguments = [method, *map(str, (text, tokenizer, output / "out", cores))]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{method} failed:\n{done.stderr[-2000:]}")
    measurement: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measurement


def _mapped(
    text: Path, output: Path, cores: int, tokens_of: Callable[[dict[str, list[str]]], Any]
) -> Callable[[], int]:
    """Return a function that runs `map`; its cache on disk counts as the output."""
    import datasets

    datasets.disable_progress_bars()

    def run() -> int:
        rows = datasets.load_dataset(
            "json", data_files=str(text), split="train", cache_dir=f"{output}-cache"
        )
        mapped = rows.map(tokens_of, batched=True, num_proc=cores, remove_columns=rows.column_names)
        ids = mapped.data.column("input_ids")
        return sum(len(chunk.values) for chunk in ids.chunks)

    return run


def _byte_level(text: Path, folder: Path) -> Path:
    """Train a byte-level BPE tokenizer.json of 4,096 tokens, as for GPT-2 and Llama 3."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with text.open(encoding="ascii") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def _json_lines(size: int) -> Iterator[str]:
    written = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if written >= size:
            return
        if "site-packages" not in path.parts:
            line = json.dumps({"text": path.read_text(encoding="utf-8", errors="replace")}) + "\n"
            written += len(line)
            yield line


if __name__ == "__main__":
    main()
