"""Engines for tests, given known weights; and what they must do, by plain torch in one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megagrow.config.deepspeed import DeepSpeedConfig
from megagrow.config.schema import BatchConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megagrow.model.decoder import CausalLM
from megagrow.parallel.engine import ZeroEngine
from megagrow.parallel.engine_config import NO_RATES, EngineSettings, rate_of
from megagrow.parallel.loss import cross_entropy
from megagrow.parallel.optimizers.muon import orthogonalized
from megagrow.parallel.optimizers.rules import MuonRule, ParamScale, matrix_rule
from megagrow.parallel.process_groups import Topology, make_topology
from megagrow.parallel.sharding import ADAMW_KINDS, ParamSpec, parameter_plan
from megagrow.reshard.layout import Layout
from tests.helpers.hugging_face import tiny, tokens
from tests.helpers.reshard.definition import held
from tests.helpers.runs import full_tensors

CONFIG = tiny(num_key_value_heads=2)
BATCH, LENGTH = 4, 8
LR = 1e-2
OPTIMIZER = OptimizerConfig(
    lr=LR, eps=1e-4, weight_decay=0.3, weight_decay_on="matrices", gradient_clipping=0.1
)
"""With a clipped norm of 0.1 most second moments are below eps: it matters, and is tested."""

Weights = dict[str, Tensor]
"""Parameter -> the whole logical tensor (rows, cols), fp32."""


@dataclass(frozen=True)
class Case:
    """Parallel layout of an engine."""

    zero: int
    tp: int
    offload: bool = False
    bf16: bool = False
    sequence_parallel: bool = False
    recompute: str = "none"
    communication: str = "fp32"
    deepspeed: DeepSpeedConfig | None = None


@dataclass
class Built:
    """An engine on this rank."""

    engine: ZeroEngine
    topology: Topology
    layout: Layout

    def full(self) -> dict[str, dict[str, Tensor]]:
        """Parameter -> kind -> the whole logical tensor."""
        return full_tensors(self.layout, self.engine.storage())

    def weights(self) -> Weights:
        """The fp32 weights."""
        return {name: kinds["fp32"] for name, kinds in self.full().items()}

    def write(self, weights: Weights) -> None:
        """Writes weights; the moments stay as they are, and Adam's step is 0."""
        storage = self.engine.storage()
        for name, values in held(self.layout, weights, self.topology.rank).items():
            storage[name]["fp32"].copy_(values)
        self.engine.ready(adam_step=0)

    def train_step(
        self,
        lr: float = LR,
        seed: int = 0,
        size: int = BATCH,
        others: Mapping[str, float] = NO_RATES,
    ) -> float:
        """One update on this rank's share of the batch of a seed; the gradient's norm."""
        ids, labels = tokens(CONFIG, size, LENGTH, seed)
        self.engine.begin_step(size // self.topology.dp)
        mine = range(self.topology.dp_rank, size, self.topology.dp)
        for index in mine:
            row, mark = ids[index : index + 1], labels[index : index + 1]
            logits = self.engine.forward(row, torch.arange(LENGTH).expand_as(row), None)
            loss = cross_entropy(logits, mark, CONFIG.vocab_size, self.topology)[0] / LENGTH
            self.engine.backward(loss, last=index == mine[-1])
        return self.engine.step(lr, others).item()

    def release(self) -> None:
        """Frees the engine."""
        self.engine.release()


def build(
    case: Case,
    scales: Mapping[str, ParamScale] | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
    config: ModelConfig = CONFIG,
) -> Built:
    """An engine of a case, with the weights of `start_weights`; all ranks together."""
    topology = make_topology(case.tp, torch.device("cpu"))
    settings = EngineSettings(
        config,
        ParallelConfig(
            tensor_model_parallel_size=case.tp,
            zero_stage=case.zero,
            offload_optimizer=case.offload,
            sequence_parallel=case.sequence_parallel,
            activation_checkpointing=case.recompute,
            communication_data_type=case.communication,
        ),
        BatchConfig(global_batch_size=BATCH, micro_batch_size=1),
        optimizer,
        case.bf16,
        scales or {},
        deepspeed=case.deepspeed,
    )
    engine = ZeroEngine(settings, topology)
    layout = Layout(engine.plan, engine.groups, case.zero, topology.dp, case.tp)
    built = Built(engine, topology, layout)
    built.write(start_weights(config))
    return built


def start_weights(config: ModelConfig = CONFIG) -> Weights:
    """Weights far from any symmetry."""
    generator, out = torch.Generator().manual_seed(5), {}
    for name, spec in parameter_plan(config, 1).items():
        noise = torch.randn(spec.rows, spec.cols, generator=generator)
        out[name] = 1 + 0.3 * noise if spec.is_vector else noise * spec.cols**-0.5
    return out


Orthogonalize = Callable[[ParamSpec, Tensor], Tensor]


def whole(spec: ParamSpec, matrix: Tensor) -> Tensor:
    """Orthogonalize the complete matrix, as Muon does."""
    return orthogonalized(matrix, steps=5, eps=1e-7)


class Plain:
    """One process, one model, torch's AdamW and Muon in fp64: what an engine must do."""

    def __init__(
        self,
        scales: Mapping[str, ParamScale] | None = None,
        optimizer: OptimizerConfig = OPTIMIZER,
        config: ModelConfig = CONFIG,
        orthogonalize: Orthogonalize = whole,
    ) -> None:
        self._config, self._optimizer = config, optimizer
        self._scales, self._orthogonalize = scales or {}, orthogonalize
        self._plan = parameter_plan(config, 1, matrix_rule(optimizer))
        self._model = CausalLM(config).double()
        weights, self._named = start_weights(config), dict(self._model.named_parameters())
        for name, parameter in self._named.items():
            parameter.data.copy_(weights[name].view(parameter.shape))
        by_muon = [name for name in self._named if self._plan[name].kinds != ADAMW_KINDS]
        self.momentum = {name: torch.zeros_like(self._named[name]) for name in by_muon}
        self._adam = torch.optim.AdamW(
            [
                {
                    "params": [parameter],
                    "eps": optimizer.eps * self._scale(name).eps,
                    "weight_decay": self._decay(name) * self._scale(name).weight_decay,
                }
                for name, parameter in self._named.items()
                if name not in self.momentum
            ],
            betas=optimizer.betas,
            foreach=False,
        )

    def gradients(self, seed: int = 0, size: int = BATCH) -> Weights:
        """Return the unclipped gradients of the mean cross-entropy on the batch of a seed."""
        ids, labels = tokens(self._config, size, LENGTH, seed)
        self._model.zero_grad()
        logits = self._model(ids, torch.arange(LENGTH).expand_as(ids))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        return {name: parameter.grad for name, parameter in self._named.items()}

    def train_step(
        self,
        lr: float = LR,
        seed: int = 0,
        size: int = BATCH,
        others: Mapping[str, float] = NO_RATES,
    ) -> float:
        """One update; the weighted norm of the gradient before clipping."""
        gradients = self.gradients(seed, size)
        squares = [self._scale(name).norm * g.square().sum() for name, g in gradients.items()]
        norm = torch.stack(squares).sum().sqrt().item()
        limit = self._optimizer.gradient_clipping
        for gradient in gradients.values():
            gradient *= min(1.0, limit / norm) if limit else 1.0
        by_adam = [name for name in self._named if name not in self.momentum]
        for group, name in zip(self._adam.param_groups, by_adam, strict=True):
            group["lr"] = others.get(rate_of(self._plan[name], self._optimizer), lr)
            group["lr"] *= self._scale(name).lr
        self._adam.step()
        for name, buffer in self.momentum.items():
            self._muon_step(name, buffer, lr * self._scale(name).lr)
        return norm

    @torch.no_grad()
    def _muon_step(self, name: str, buffer: Tensor, lr: float) -> None:
        """As torch.optim.Muon, in fp64 and with its factor for other norms."""
        spec, weight, momentum = self._plan[name], self._named[name], self._optimizer.momentum
        assert isinstance(spec.rule, MuonRule) and weight.grad is not None
        buffer.lerp_(weight.grad, 1 - momentum)
        mean = weight.grad.lerp(buffer, momentum) if self._optimizer.nesterov else buffer
        weight.mul_(1 - lr * self._decay(name) * self._scale(name).weight_decay)
        update = self._orthogonalize(spec, mean)
        weight.sub_(update, alpha=lr * spec.rule.adjustment(spec.rows, spec.cols))

    def blend(self, step: Callable[[], object], factors: Mapping[str, Tensor]) -> None:
        """Does a step, of whose change each entry keeps its factor (rows, cols)."""
        before = {name: parameter.detach().clone() for name, parameter in self._named.items()}
        step()
        for name, parameter in self._named.items():
            factor = factors[name].view(parameter.shape)
            parameter.data.copy_(before[name] + factor * (parameter.detach() - before[name]))

    def weights(self) -> Weights:
        """As matrices, fp64."""
        return {name: p.detach().reshape(len(p), -1) for name, p in self._named.items()}

    def _scale(self, name: str) -> ParamScale:
        return self._scales.get(name, ParamScale())

    def _decay(self, name: str) -> float:
        decays = self._optimizer.weight_decay_on == "all" or "norm" not in name
        decays = decays and name not in self._optimizer.weight_decay_exclude
        return self._optimizer.weight_decay if decays else 0.0


def difference(one: Weights, other: Weights) -> float:
    """The largest difference of any two elements."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
