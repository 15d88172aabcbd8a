"""The cases of the regression check: each produces a folder of data with one checkout."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from tools.regression import run_files
from tools.regression.launching import Workers, torchrun
from tools.regression.run_files import GROWN, MODEL, VOCABULARY, Section

DONE = "done"
"""Marks the folder of a case that is complete."""

WORLD = 2
LAYOUTS = tuple((zero, tp) for zero in range(4) for tp in (1, 2))
RESUMED_AT = {1: 2, 2: 6}
"""TP size -> step from which a run is resumed: before the first growth, or in the second stage."""


@dataclass(frozen=True)
class RegressionCase:
    """Check that produces its data in a folder by `produce(runner, folder)`."""

    name: str
    produce: "Callable[[CheckoutRunner, Path], None]"
    sources: tuple[str, ...] = ("prepare",)
    """Cases of OLD whose data this case reads."""
    reference: str | None = None
    """Case of OLD with which the data of NEW is compared; None for the same case."""


class CheckoutRunner:
    """One checkout with its processes and the folders of its cases."""

    def __init__(
        self, label: str, checkout: Path, work: Path, ranks: Workers, single: Workers
    ) -> None:
        self.label = label
        self.checkout = checkout
        self.work = work
        self.ranks = ranks
        self.single = single

    @property
    def old(self) -> Path:
        """Folder of OLD's cases, whose data both checkouts read."""
        return self.work / "old"

    @property
    def corpus(self) -> Path:
        """The corpus of all runs."""
        return self.old / "prepare" / "corpus"

    def folder(self, name: str) -> Path:
        """Folder of a case."""
        return self.work / self.label / name

    def need(self, name: str) -> Path:
        """Produce a case unless it is complete; return its folder. Raises CommandFailed."""
        folder = self.folder(name)
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            CASES[name].produce(self, folder)
            (folder / DONE).touch()
        return folder


def _prepare(runner: CheckoutRunner, folder: Path) -> None:
    run_files.write_texts(runner.work / "texts")
    source, size = str(runner.work / "texts"), str(VOCABULARY)
    command = ["prepare", source, "--output", "corpus", "--tokenizer", "train"]
    options = ["--vocab-size", size, "--validation-fraction", "0.1", "--workers", "1"]
    runner.single.run(folder, [*command, *options])


def _prepare_sft(runner: CheckoutRunner, folder: Path) -> None:
    source = runner.work / "alpaca.json"
    run_files.write_instructions(source)
    command = ["prepare-sft", str(source), "--output", "corpus"]
    command += ["--tokenizer", str(runner.corpus / "tokenizer.model")]
    options = ["--sequence-length", "256", "--validation-fraction", "0.1"]
    runner.single.run(folder, command + options)


def _train(
    runner: CheckoutRunner, folder: Path, *, values: Callable[[CheckoutRunner], Section]
) -> None:
    _write_run(folder, values(runner))
    runner.ranks.run(folder, ["train", "run.yaml"])


def _write_run(folder: Path, values: Section) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _staged(runner: CheckoutRunner, zero: int, tp: int) -> Section:
    return run_files.run_file(runner.corpus, run_files.staged(), zero, tp)


def _growth(runner: CheckoutRunner, name: str) -> Section:
    zero, tp, stages = run_files.growths()[name]
    return run_files.run_file(runner.corpus, stages, zero, tp)


def _sft(runner: CheckoutRunner) -> Section:
    corpus = runner.old / "prepare-sft" / "corpus"
    model = MODEL | run_files.WIDE | {"num_hidden_layers": 8, "max_position_embeddings": 256}
    values = run_files.run_file(runner.corpus, [run_files.stage(model, tokens=8192)], 2, 1)
    data: Section = {
        "train": [{"path": str(corpus / "train")}],
        "validation": [{"path": str(corpus / "validation")}],
        "sequence_length": 256,
        "reset_position_ids": True,
        "reset_attention_mask": True,
    }
    source = str(runner.old / "train-z1-tp1" / "run")
    return values | {"stage": "sft", "init_from": source, "data": values["data"] | data}


def _torchrun(runner: CheckoutRunner, folder: Path) -> None:
    _write_run(folder, _staged(runner, 2, 1))
    torchrun(runner.checkout, WORLD, folder, ["train", "run.yaml"])


def _resume(
    runner: CheckoutRunner, folder: Path, *, source: str, of_old: bool, step: int, to: str
) -> None:
    """Resume a copy of a run without the checkpoints after a step."""
    run = runner.old / source if of_old else runner.need(source)
    shutil.copytree(run / "run", folder / "run")
    shutil.copy(run / "run.yaml", folder)
    for checkpoint in sorted((folder / "run" / "checkpoints").iterdir()):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    overrides = [word for key in to.split() for word in ("--set", key)]
    runner.ranks.run(folder, ["train", "run.yaml", *overrides])


def _convert(runner: CheckoutRunner, folder: Path, *, source: str, arguments: str) -> None:
    """Run a conversion of OLD's data; SOURCE in `arguments` is replaced by its path."""
    path = str(runner.old / source)
    words = [path if word == "SOURCE" else word for word in arguments.split()]
    runner.single.run(folder, words)


def _grow(runner: CheckoutRunner, folder: Path, *, growth: str) -> None:
    """Grow a checkpoint of OLD from file to file."""
    changes, options = GROWN[growth]
    source = runner.old / "train-z2-tp2" / "run" / "checkpoints" / "step-000000004"
    (folder / "model.yaml").write_text(yaml.safe_dump(MODEL | changes), encoding="utf-8")
    command = ["grow", str(source), "out", "--to", "model.yaml", "--seed", "5"]
    command += ["--operator", growth.split()[0]]
    for key, value in options.items():
        command += ["--set", f"growth.{key}={json.dumps(value)}"]
    runner.single.run(folder, command)


def _all_cases() -> Iterator[RegressionCase]:
    yield RegressionCase("prepare", _prepare, ())
    yield RegressionCase("prepare-sft", _prepare_sft)
    for zero, tp in LAYOUTS:
        values = partial(_staged, zero=zero, tp=tp)
        yield RegressionCase(f"train-z{zero}-tp{tp}", partial(_train, values=values))
        yield from _resumes(f"z{zero}-tp{tp}", f"train-z{zero}-tp{tp}", RESUMED_AT[tp])
    layout = "parallel.zero_stage=3 parallel.tensor_model_parallel_size=2"
    yield from _resumes("other-layout", "train-z1-tp1", 6, layout)
    yield RegressionCase("train-torchrun", _torchrun)
    for name in run_files.growths():
        yield RegressionCase(f"train-{name}", partial(_train, values=partial(_growth, name=name)))
    sources = ("prepare-sft", "train-z1-tp1")
    yield RegressionCase("train-sft", partial(_train, values=_sft), sources)
    for growth in GROWN:
        grow = partial(_grow, growth=growth)
        yield RegressionCase(f"grow-{growth.replace(' ', '-')}", grow, ("train-z2-tp2",))
    yield from _conversions()


def _resumes(name: str, source: str, step: int, to: str = "") -> Iterator[RegressionCase]:
    """Yield a run resumed by the checkout that started it, and a run of OLD resumed by NEW."""
    resume = partial(_resume, source=source, step=step, to=to)
    yield RegressionCase(f"resume-{name}", partial(resume, of_old=False), (source,))
    cross = partial(resume, of_old=True)
    yield RegressionCase(f"cross-resume-{name}", cross, (source,), f"resume-{name}")


def _conversions() -> Iterator[RegressionCase]:
    run = "train-z3-tp2/run"
    for name, source, arguments in (
        ("hf-export", run, "convert hf-export SOURCE out"),
        ("hf-export-bf16", run, "convert hf-export SOURCE out --dtype bfloat16 --shard-size 200KB"),
        ("hf-import", "hf-export/out", "convert hf-import SOURCE out --zero-stage 2 --dp 2"),
        ("reshard", run, "convert reshard SOURCE out --zero-stage 1 --dp 3 --tp 1"),
        ("reshard-tp", "train-z0-tp1/run", "convert reshard SOURCE out --zero-stage 3 --tp 2"),
        ("universal-export", run, "convert universal-export SOURCE out"),
        ("universal-import", "universal-export/out", "convert universal-import SOURCE out"),
        ("megatron-export", run, "convert megatron-export SOURCE out --tp 2"),
        ("megatron-import", "megatron-export/out", "convert megatron-import SOURCE out"),
    ):
        convert = partial(_convert, source=source, arguments=arguments)
        yield RegressionCase(name, convert, (source.split("/")[0],))


CASES = {case.name: case for case in _all_cases()}
