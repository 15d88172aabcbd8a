"""Reference forward pass and training of a small model, in fp64 and in one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from megagrow.config.schema import ModelConfig
from megagrow.model.decoder import CausalLM
from megagrow.model.masks import Masks
from megagrow.parallel.optimizers.muon import orthogonalized
from megagrow.parallel.optimizers.rules import ADAMW, MuonRule, ParamScale, UpdateRule
from megagrow.parallel.sharding import ADAMW_KINDS, StateKind, parameter_plan
from tools.docs.operators.cases import GrowthCase
from tools.docs.operators.dense_growth import State, grown

Tensors = dict[str, Tensor]
"""Parameter -> full logical tensor (rows, cols), fp64."""

BEFORE, AFTER = 5, 15
"""Steps of the source, and then of the source and of the grown model."""


@dataclass(frozen=True)
class Adam:
    """Hyperparameters of AdamW, and of Muon for the matrices, with clipping by the global norm."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.1
    clipping: float = 0.5
    matrices: UpdateRule = ADAMW
    momentum: float = 0.95


def random_weights(config: ModelConfig, seed: int = 0) -> Tensors:
    """Return weights without any symmetry, with gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, spec in parameter_plan(config, tp=1).items():
        noise = torch.randn(spec.rows, spec.cols, generator=generator, dtype=torch.float64)
        out[name] = 1 + 0.3 * noise if spec.is_vector else noise * spec.cols**-0.5
    return out


def random_ids(config: ModelConfig, length: int = 6, seed: int = 0) -> Tensor:
    """Return two sequences of random tokens, (2, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


def logits(
    config: ModelConfig,
    weights: Tensors,
    ids: Tensor,
    first: int = 0,
    masks: Masks | None = None,
) -> Tensor:
    """Return the logits (B, S, V) of ids (B, S) at positions from `first`."""
    plan = parameter_plan(config, tp=1)
    shaped = {name: w.ravel() if plan[name].is_vector else w for name, w in weights.items()}
    positions = torch.arange(first, first + ids.shape[1]).expand_as(ids)
    return functional_call(
        _skeleton(config.model_dump_json()), shaped, (ids, positions, None, masks)
    )


@lru_cache(maxsize=64)
def _skeleton(config: str) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(ModelConfig.model_validate_json(config))


def grown_weights(case: GrowthCase, weights: Tensors) -> Tensors:
    """Apply a growth to weights; differentiable."""
    state = {name: {"fp32": w} for name, w in weights.items()}
    return weights_of(grown(state, case.growth, case.target, ("fp32",)))


def apart(case: GrowthCase, before: Tensors, after: Tensors, ids: Tensor, first: int = 0) -> float:
    """Return the largest difference of a logit between source and target weights."""
    with torch.no_grad():
        old = logits(case.source, before, ids, first)
        new = logits(case.target, after, ids, first)
    return (old - new).abs().max().item()


def loss(config: ModelConfig, weights: Tensors, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token."""
    predicted = logits(config, weights, ids)[:, :-1]
    return cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten())


def gradients(config: ModelConfig, weights: Tensors, ids: Tensor) -> Tensors:
    """Return the gradient of the loss with respect to each parameter, (rows, cols)."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    values = torch.autograd.grad(loss(config, leaves, ids), list(leaves.values()))
    return dict(zip(leaves, values, strict=True))


def trained(
    config: ModelConfig,
    state: State,
    batches: list[Tensor],
    step: int = 0,
    adam: Adam | None = None,
    scales: Mapping[str, ParamScale] | None = None,
) -> State:
    """Return the state after one update per batch by torch's AdamW, from step count `step`.

    Matrices are updated by Muon if that is their rule. `scales` are factors on each parameter's lr,
    weight decay and eps, and on its squared gradient in the global norm.
    """
    adam, scales = adam or Adam(), scales or {}
    leaves = {name: kinds["fp32"].clone().requires_grad_() for name, kinds in state.items()}
    rules = {name: s.rule for name, s in parameter_plan(config, 1, adam.matrices).items()}
    by_adamw = {name: leaf for name, leaf in leaves.items() if rules[name] == ADAMW}
    optimizer = _adamw(by_adamw, adam, scales)
    moments = {
        name: {kind: state[name][kind].clone() for kind in rule.kinds[1:]}
        for name, rule in rules.items()
    }
    for name, leaf in by_adamw.items():
        optimizer.state[leaf] = {"step": torch.tensor(float(step)), **moments[name]}
    for ids in batches:
        grads = gradients(config, leaves, ids)
        squares = [scales.get(n, ParamScale()).norm * g.square().sum() for n, g in grads.items()]
        norm = torch.stack(squares).sum().sqrt()
        for name, leaf in leaves.items():
            leaf.grad = grads[name] * min(1.0, adam.clipping / norm.item())
        optimizer.step()
        for name in leaves.keys() - by_adamw.keys():
            buffer, scale = moments[name]["momentum_buffer"], scales.get(name, ParamScale())
            _muon_update(leaves[name], buffer, rules[name], adam, scale)
    return {name: {"fp32": leaf.detach()} | moments[name] for name, leaf in leaves.items()}


@torch.no_grad()
def _muon_update(
    weight: Tensor, buffer: Tensor, rule: UpdateRule, adam: Adam, scale: ParamScale
) -> None:
    assert isinstance(rule, MuonRule) and weight.grad is not None
    lr = adam.lr * scale.lr
    buffer.lerp_(weight.grad, 1 - adam.momentum)
    mean = weight.grad.lerp(buffer, adam.momentum)
    update = orthogonalized(mean, steps=5, eps=adam.eps * scale.eps)
    weight.mul_(1 - lr * adam.weight_decay * scale.weight_decay)
    weight.sub_(update, alpha=lr * rule.adjustment(*weight.shape))


def _adamw(leaves: Tensors, adam: Adam, scales: Mapping[str, ParamScale]) -> torch.optim.AdamW:
    groups = []
    for name, leaf in leaves.items():
        scale = scales.get(name, ParamScale())
        groups.append(
            {
                "params": [leaf],
                "lr": adam.lr * scale.lr,
                "weight_decay": adam.weight_decay * scale.weight_decay,
                "eps": adam.eps * scale.eps,
            }
        )
    return torch.optim.AdamW(groups, betas=adam.betas, foreach=False)


def weights_of(state: State) -> Tensors:
    """Return the weights of a state."""
    return {name: kinds["fp32"] for name, kinds in state.items()}


def fresh_state(
    weights: Tensors, kinds: Mapping[str, Sequence[StateKind]] = MappingProxyType({})
) -> State:
    """Return a state with zero moments; `kinds` are the states of parameters without AdamW."""
    return {
        name: {kind: torch.zeros_like(w) for kind in kinds.get(name, ADAMW_KINDS)} | {"fp32": w}
        for name, w in weights.items()
    }


def random_batches(config: ModelConfig, count: int, seed: int = 0) -> list[Tensor]:
    """Return batches of random tokens, each (2, 6) int64."""
    return [random_ids(config, seed=seed + k) for k in range(count)]


def trained_source(config: ModelConfig, adam: Adam | None = None) -> State:
    """Return the state of a random model after `BEFORE` steps."""
    plan = parameter_plan(config, 1, (adam or Adam()).matrices)
    kinds = {name: spec.kinds for name, spec in plan.items()}
    start = fresh_state(random_weights(config), kinds)
    return trained(config, start, random_batches(config, BEFORE), adam=adam)


def trajectory_difference(
    case: GrowthCase,
    transported: bool = True,
    scales: Mapping[str, ParamScale] | None = None,
    adam: Adam | None = None,
    steps: int = AFTER,
) -> float:
    """Return the largest difference of a logit after training source and grown model further.

    Both train `steps` steps on the same batches. `scales` replaces the factors of the growth; the
    moments are reset unless `transported`.
    """
    source, target = case.source, case.target
    old = trained_source(source, adam)
    new = grown(old, case.growth, target, matrices=case.matrices)
    if not transported:
        new = fresh_state(weights_of(new), new)
    scales = case.growth.scales if scales is None else scales
    later = random_batches(source, steps, seed=1000)
    old = trained(source, old, later, BEFORE, adam)
    new = trained(target, new, later, BEFORE if transported else 0, adam, scales)
    return apart(case, weights_of(old), weights_of(new), random_ids(source, seed=7))
