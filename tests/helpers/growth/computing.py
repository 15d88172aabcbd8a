"""What a model of given whole weights computes and learns, in fp64 and in one process."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from megagrow.config.schema import ModelConfig
from megagrow.model.llama import LlamaForCausalLM
from megagrow.model.masks import Masks
from megagrow.parallel.engine_config import ParamScale
from megagrow.parallel.sharding import STATE_KINDS, parameter_plan
from tests.helpers.growth.cases import Case
from tests.helpers.growth.whole import State, grown

Tensors = dict[str, Tensor]
"""Parameter -> the whole logical tensor (rows, cols), fp64."""


@dataclass(frozen=True)
class Adam:
    """AdamW with clipping by the global norm, as a stage of a run sets it."""

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.1
    clipping: float = 0.5


def random_weights(config: ModelConfig, seed: int = 0) -> Tensors:
    """Weights far from any symmetry; gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, spec in parameter_plan(config, tp=1).items():
        noise = torch.randn(spec.rows, spec.cols, generator=generator, dtype=torch.float64)
        out[name] = 1 + 0.3 * noise if spec.is_vector else noise * spec.cols**-0.5
    return out


def random_moments(config: ModelConfig, seed: int = 0) -> State:
    """Random weights, exp_avg and exp_avg_sq."""
    weights, first, second = (random_weights(config, seed + 100 * k) for k in range(3))
    return {
        name: {"fp32": weights[name], "exp_avg": first[name], "exp_avg_sq": second[name] ** 2}
        for name in weights
    }


def random_ids(config: ModelConfig, length: int = 6, seed: int = 0) -> Tensor:
    """Two sequences of random tokens, (2, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


def every_id(config: ModelConfig, seed: int = 0) -> Tensor:
    """One sequence that holds every token twice, (1, 2 vocab) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(2 * config.vocab_size, generator=generator)[None] % config.vocab_size


def logits(
    config: ModelConfig,
    weights: Tensors,
    ids: Tensor,
    first: int = 0,
    masks: Masks | None = None,
) -> Tensor:
    """(B, S, V) of ids (B, S) whose positions count from `first`."""
    plan = parameter_plan(config, tp=1)
    shaped = {name: w.ravel() if plan[name].is_vector else w for name, w in weights.items()}
    positions = torch.arange(first, first + ids.shape[1]).expand_as(ids)
    return functional_call(
        _skeleton(config.model_dump_json()), shaped, (ids, positions, None, masks)
    )


@lru_cache(maxsize=64)
def _skeleton(config: str) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(ModelConfig.model_validate_json(config))


def grown_weights(case: Case, weights: Tensors) -> Tensors:
    """The weights that a growth makes of others; differentiable."""
    state = {name: {"fp32": w} for name, w in weights.items()}
    made = grown(state, case.growth, case.target, ("fp32",))
    return {name: kinds["fp32"] for name, kinds in made.items()}


def difference(case: Case, weights: Tensors | None = None) -> float:
    """The largest difference of any logit that a growth makes, at several positions."""
    weights = random_weights(case.source) if weights is None else weights
    after = grown_weights(case, weights)
    ids = random_ids(case.source)
    return max(apart(case, weights, after, ids, first) for first in (0, 13))


def apart(case: Case, before: Tensors, after: Tensors, ids: Tensor, first: int = 0) -> float:
    """The largest difference of logits between a source's and a target's weights."""
    with torch.no_grad():
        old = logits(case.source, before, ids, first)
        new = logits(case.target, after, ids, first)
    return (old - new).abs().max().item()


def loss(config: ModelConfig, weights: Tensors, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    found = logits(config, weights, ids)[:, :-1]
    return cross_entropy(found.flatten(0, 1), ids[:, 1:].flatten())


def gradients(config: ModelConfig, weights: Tensors, ids: Tensor) -> Tensors:
    """The gradient of the loss for every parameter, (rows, cols)."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    found = torch.autograd.grad(loss(config, leaves, ids), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def trained(
    config: ModelConfig,
    state: State,
    batches: list[Tensor],
    step: int = 0,
    adam: Adam | None = None,
    scales: Mapping[str, ParamScale] | None = None,
) -> State:
    """The state after one update for each batch by torch's AdamW, which has done `step` before.

    `scales` are factors on each parameter's lr, weight decay and eps, and on its square in the
    norm by which gradients are clipped.
    """
    adam, scales = adam or Adam(), scales or {}
    leaves = {name: kinds["fp32"].clone().requires_grad_() for name, kinds in state.items()}
    optimizer = _adamw(leaves, adam, scales)
    for name, leaf in leaves.items():
        moments = {kind: state[name][kind].clone() for kind in STATE_KINDS[1:]}
        optimizer.state[leaf] = {"step": torch.tensor(float(step)), **moments}
    for ids in batches:
        found = gradients(config, leaves, ids)
        squares = [scales.get(n, ParamScale()).norm * g.square().sum() for n, g in found.items()]
        norm = torch.stack(squares).sum().sqrt()
        for name, leaf in leaves.items():
            leaf.grad = found[name] * min(1.0, adam.clipping / norm.item())
        optimizer.step()
    return {
        name: {"fp32": leaf.detach()}
        | {kind: optimizer.state[leaf][kind] for kind in STATE_KINDS[1:]}
        for name, leaf in leaves.items()
    }


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
    """The weights alone."""
    return {name: kinds["fp32"] for name, kinds in state.items()}


def fresh_state(weights: Tensors) -> State:
    """Weights with which Adam has not begun."""
    return {
        name: {"fp32": w, "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}
        for name, w in weights.items()
    }
