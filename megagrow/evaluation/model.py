"""Load a checkpoint of any layout into a forward-only model with any tensor parallelism."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megagrow.checkpoint.source import Source
from megagrow.config.schema import ModelConfig
from megagrow.config.stage import KernelsConfig
from megagrow.errors import CheckpointError, ConfigError, DataError
from megagrow.evaluation.forward_model import positions_of
from megagrow.evaluation.generation import GenerationDefaults
from megagrow.evaluation.tokenizer import EvalTokenizer, open_tokenizer
from megagrow.formats.hugging_face_origin import HuggingFaceOrigin
from megagrow.formats.open_source import find_source_on_all_ranks, open_found
from megagrow.model.backends import choose, model_workload
from megagrow.model.decoder import CausalLM, HeadLoss
from megagrow.model.decoding import DecodingCache
from megagrow.model.layers.table import indivisible_sizes
from megagrow.model.machine import machine_of
from megagrow.model.ops import Ops, make_ops
from megagrow.offline.hugging_face_files import named_tokenizer, warn_of_other_tokenizer
from megagrow.parallel.agreement import run_on_all_ranks
from megagrow.parallel.materialize import materialize
from megagrow.parallel.process_groups import Topology
from megagrow.parallel.sharding import parameter_plan
from megagrow.parallel.tensor_parallel import parallelize
from megagrow.reshard.fill import fill_read
from megagrow.reshard.layout import Layout
from megagrow.train.source_state import state_of, still_masked
from megagrow.train.train_state import RunState

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """Model and tokenizer; a `ForwardModel`."""

    model: CausalLM
    tokenizer: EvalTokenizer
    path: Path
    """Source: a checkpoint or a Hugging Face folder."""
    run: RunState | None
    """State of the run that saved it; None if the source belongs to no run."""
    generation: GenerationDefaults

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward_head(
        self, ids: Tensor, head: HeadLoss, result: Tensor, cache: DecodingCache | None = None
    ) -> None:
        positions = positions_of(ids, ids.shape[1], cache)
        result.copy_(self.model(ids, positions, None, None, head, cache))

    def finish(self) -> None:
        """Do nothing: no pass waits for another data-parallel rank."""


def load_model(
    path: Path, topology: Topology, tokenizer: str | None = None, dtype: str | None = None
) -> LoadedModel:
    """Load the model at `path`. Collective.

    `path` is a checkpoint, a run directory (its newest checkpoint) or a Hugging Face folder.
    `dtype` is `float32` or `bfloat16`; the default is float32 on a CPU and bfloat16 on a GPU.
    Raises InputError if the source is damaged, has no tokenizer or has growth masks that are still
    ramping, and if the tensor-parallel size does not divide the model.
    """
    source_path = find_source_on_all_ranks(path)
    return run_on_all_ranks(lambda: _load(source_path, topology, tokenizer, dtype))


def _load(path: Path, topology: Topology, tokenizer: str | None, dtype: str | None) -> LoadedModel:
    source = open_found(path)
    if still_masked(source):
        raise CheckpointError(
            f"{source.path}: growth masks are still ramping, and without them it is a different "
            "model; evaluate a later checkpoint"
        )
    _check_divides(source.model, topology.tp)
    texts = _open_tokenizer(source, tokenizer, warns=topology.rank == 0)
    model = build_model(source, topology, _dtype(dtype, topology.device))
    run = None if source.run is None else state_of(source)
    return LoadedModel(model, texts, source.path, run, generation_defaults(source))


def generation_defaults(source: Source) -> GenerationDefaults:
    """Return the generation settings of the Hugging Face folder that the model is or comes from."""
    origin = HuggingFaceOrigin.recorded(source.environment)
    if origin.generation_config is not None:
        return GenerationDefaults.of(origin.generation_config)
    # As in transformers, only the token ids of config.json are generation settings.
    return GenerationDefaults.of({"eos_token_id": (origin.config or {}).get("eos_token_id")})


def build_model(source: Source, topology: Topology, dtype: torch.dtype) -> CausalLM:
    """Build this rank's tensor-parallel shard of the model, with weights read from the source."""
    plan = parameter_plan(source.model, topology.tp)
    with torch.device("meta"):
        model = CausalLM(source.model, ops=_ops(source.model, dtype, topology.device))
    parallelize(model.to(dtype), plan, topology, sequence_parallel=False)
    materialize(model, topology.device, None)
    layout = Layout(plan, (tuple(plan),), zero_stage=0, dp=topology.dp, tp=topology.tp)
    storage = {name: {"fp32": _flat(weight)} for name, weight in model.named_parameters()}
    fill_read(layout, topology.rank, storage, ("fp32",), source.read)
    return model.eval()


def _flat(weight: nn.Parameter) -> Tensor:
    return weight.data.view(-1)


def _ops(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Ops:
    machine, work = machine_of(device), model_workload(model, dtype)
    return make_ops(choose(KernelsConfig(), machine, work), machine, work)


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype {name}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _open_tokenizer(source: Source, override: str | None, warns: bool) -> EvalTokenizer:
    name = override or named_tokenizer(source)
    if name is None:
        raise DataError(f"{source.path}: the source names no tokenizer; pass one with --tokenizer")
    if override is None and not Path(name).exists():
        raise DataError(f"{name}: the tokenizer of the run does not exist; pass --tokenizer")
    opened = open_tokenizer(str(name), source.model.vocab_size)
    if override is not None and warns:
        warn_of_other_tokenizer(source, Path(override))
    return opened


def _check_divides(model: ModelConfig, tp: int) -> None:
    for name, size in indivisible_sizes(model, tp):
        raise ConfigError(f"--tp {tp} does not divide the model's {name} = {size}")
