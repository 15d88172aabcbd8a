"""A checkpoint as a model that only computes forward: any layout in, any tensor parallelism out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megagrow.checkpoint.source import Source
from megagrow.config.schema import ModelConfig
from megagrow.config.sections import KernelsConfig
from megagrow.errors import CheckpointError, ConfigError
from megagrow.evaluation.tokenizer import Texts, open_texts
from megagrow.formats.open_source import find_source, open_found
from megagrow.model.backends import KernelWorkload, choose
from megagrow.model.llama import HeadLoss, LlamaForCausalLM
from megagrow.model.machine import machine_of
from megagrow.model.ops import Ops, make_ops
from megagrow.offline.convert import named_tokenizer
from megagrow.parallel.agreement import run_on_all_ranks, run_on_rank_zero
from megagrow.parallel.materialize import materialise
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import parameter_plan
from megagrow.parallel.tensor_parallel import parallelize
from megagrow.reshard.fill import fill_read
from megagrow.reshard.layout import Layout
from megagrow.train.source_state import still_masked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A model and what its texts are written in; for `scores.Scorer`."""

    model: LlamaForCausalLM
    texts: Texts
    path: Path
    """What was read: a checkpoint or a Hugging Face folder."""
    run: dict[str, Any] | None
    """Where its run stood; None if it comes from no run."""

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def pass_through(self, ids: Tensor, head: HeadLoss) -> None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        self.model(ids, positions, None, None, head)

    def finish(self) -> None:
        """Nothing: no pass waits for another data-parallel rank."""


def load(
    path: Path, topology: Topology, tokenizer: str | None = None, dtype: str | None = None
) -> Loaded:
    """The model at `path` (a checkpoint, a run's newest, a Hugging Face folder); all ranks call it.

    `dtype` is float32 or bfloat16; by default the former on CPUs and the latter on GPUs.
    InputError for a damaged source, one without a tokenizer, one whose new parts still stand behind
    masks, and a tensor parallelism that does not divide the model.
    """
    found = run_on_rank_zero(lambda: find_source(path))
    return run_on_all_ranks(lambda: _load(found, topology, tokenizer, dtype))


def _load(found: Path, topology: Topology, tokenizer: str | None, dtype: str | None) -> Loaded:
    source = open_found(found)
    if still_masked(source):
        raise CheckpointError(
            f"{source.path}: parts of it still stand behind masks, without which it is another "
            "model; evaluate a later checkpoint"
        )
    _check_divides(source.model, topology.tp)
    texts = _texts(source, tokenizer)
    numbers = _dtype(dtype, topology.device)
    return Loaded(build(source, topology, numbers), texts, source.path, source.run)


def build(source: Source, topology: Topology, dtype: torch.dtype) -> LlamaForCausalLM:
    """This rank's tensor-parallel share of the model, its weights read from the source's files."""
    plan = parameter_plan(source.model, topology.tp)
    with torch.device("meta"):
        model = LlamaForCausalLM(source.model, ops=_ops(source.model, dtype, topology.device))
    parallelize(model.to(dtype), plan, topology, sequence_parallel=False)
    materialise(model, topology.device, None)
    layout = Layout(plan, (tuple(plan),), zero_stage=0, dp=topology.dp, tp=topology.tp)
    storage = {name: {"fp32": _flat(weight)} for name, weight in model.named_parameters()}
    fill_read(layout, topology.rank, storage, ("fp32",), source.read)
    return model.eval()


def _flat(weight: nn.Parameter) -> Tensor:
    return weight.data.view(-1)


def _ops(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Ops:
    machine, work = machine_of(device), KernelWorkload(dtype, model.head_dim, packed=False)
    return make_ops(choose(KernelsConfig(), machine, work), machine, work)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype {name}: should be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _texts(source: Source, given: str | None) -> Texts:
    name = given or named_tokenizer(source)
    if name is None:
        raise ConfigError(f"{source.path}: names no tokenizer; give one with --tokenizer")
    if given is None and not Path(name).exists():
        raise ConfigError(f"{name}, the tokenizer of its run, is not here; give --tokenizer")
    return open_texts(str(name), source.model.vocab_size)


def _check_divides(model: ModelConfig, tp: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(model, name)
        if size % tp != 0:
            raise ConfigError(f"--tp {tp} does not divide the model's {name} {size}")
