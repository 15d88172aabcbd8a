"""Train a learned growth (LiGO) on the next tokens of the stream.

The recipe is that of Du et al. 2024: some steps with the target's batch size and AdamW, a learning
rate that rises to 7e-5 and follows a cosine to 7e-6, and gradients clipped to norm 1. There is no
weight decay, because it would pull B, A and D to zero. The source is frozen.

The learnable parameters are small, equal on all ranks, and freed after the growth. Every rank
computes all layers: pipeline ranks share their micro-batches as data-parallel ranks. A job that is
killed here resumes from the checkpoint before the growth, with the same result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from megagrow.common.progress import PhaseProgress
from megagrow.config.growth import LearnConfig
from megagrow.config.schema import OptimizerConfig, RunConfig, ScheduleConfig
from megagrow.config.stage_length import batch_at, step_tokens
from megagrow.data.batches import Batch
from megagrow.growth.ligo import (
    LigoParameters,
    forming_flops,
    grown_slice,
    initial,
    learned_map,
)
from megagrow.growth.map import GrowthMap
from megagrow.growth.operators import resolve_operators
from megagrow.model.backends import uses_bf16
from megagrow.model.decoder import CausalLM
from megagrow.model.layers.flops import flops_per_token, paper_flops_per_token
from megagrow.model.layers.table import EMBEDDING, HEAD_MODULE, module_names
from megagrow.parallel.engine_config import EngineSettings
from megagrow.parallel.loss import IGNORED, cross_entropy
from megagrow.parallel.materialize import build_model
from megagrow.parallel.process_groups import Topology, make_topology, stage_topology
from megagrow.parallel.sharding import ParamSpec, parameter_plan
from megagrow.reshard.dense import mixtures
from megagrow.reshard.exchange import ShardedState
from megagrow.train.growth_event.cost import Feed, GrowthCost
from megagrow.train.kernel_calls import NO_CHECKS, Checks
from megagrow.train.kernel_selection import stage_ops
from megagrow.train.schedule import learning_rate
from megagrow.train.step import model_inputs

BETAS, CLIP = (0.9, 0.95), 1.0
"""AdamW settings and gradient clipping of the authors' recipe."""


def learn_growth(
    run: RunConfig,
    index: int,
    source: ShardedState,
    device: torch.device,
    feed: Feed,
    checks: Checks = NO_CHECKS,
) -> tuple[GrowthMap, GrowthCost]:
    """Train and return the growth map of stage `index`. Collective.

    Raises DataError if the stream cannot be read.
    """
    stage = run.stages[index]
    assert stage.growth is not None
    parts = resolve_operators(
        run.stages[index - 1].model, stage.model, stage.growth, f"{run.seed}/stage-{index}"
    )
    parallel = stage.parallel
    topology = make_topology(
        parallel.tensor_model_parallel_size, device, parallel.context_parallel_size
    )
    pipeline = stage_topology(parallel, device)
    bf16 = uses_bf16(run, device)
    settings = EngineSettings(
        model=stage.model,
        parallel=parallel,
        batch=stage.batch,
        optimizer=stage.optimizer,
        bf16=bf16,
        ops=stage_ops(run, index, device, checks),
    )
    learned = initial(parts, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = formed_model(Forming(learned, source, settings, topology, dtype))
    adam = torch.optim.AdamW(learned.tensors(), betas=BETAS, weight_decay=0.0)
    losses = []
    progress = PhaseProgress("growth", stage.growth.learn.steps, "steps")
    for step in range(stage.growth.learn.steps):
        batches = _shared(feed.batches(step, stage, pipeline, model.ops), pipeline)
        losses.append(summed_gradients(model, learned, batches, topology, step_tokens(stage)))
        norm = nn.utils.clip_grad_norm_(learned.tensors(), CLIP)
        for group in adam.param_groups:
            group["lr"] = _rate(stage.growth.learn, step)
        if norm.isfinite():  # the same on all ranks; else the step is skipped
            adam.step()
        progress.advance()
    return learned_map(learned), _spent(run, index, learned, losses)


def summed_gradients(
    model: CausalLM,
    learned: LigoParameters,
    batches: Sequence[Batch],
    topology: Topology,
    tokens: int,
) -> float:
    """Run forward and backward over this rank's micro-batches. Collective.

    `tokens` is the number of tokens of the global batch. Returns the global batch's mean loss and
    sets `grad` of the learnable parameters to its gradient, the same on all ranks.
    """
    total = torch.zeros((), device=topology.device)
    vocab = learned.growth.target.vocab_size
    for tensor in learned.tensors():
        tensor.grad = None
    for batch in batches:
        logits = model(*model_inputs(batch, model.ops, topology.device))
        labels = batch.labels.to(topology.device, non_blocking=True)
        loss = cross_entropy(logits, labels, vocab, topology, model.ops.loss)[0]
        loss = loss / tokens
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total, group=topology.dp_group)
    _sum_over_ranks([tensor.grad for tensor in learned.tensors()])
    return total.item()


def _shared(batches: list[Batch], pipeline: Topology) -> list[Batch]:
    """Return this pipeline rank's part of the micro-batches that all pipeline ranks have read.

    All get the same number: a rank with fewer repeats the last micro-batch without labels.
    """
    own = batches[pipeline.pp_rank :: pipeline.pp]
    unlabeled = replace(batches[-1], labels=torch.full_like(batches[-1].labels, IGNORED))
    return own + [unlabeled] * (-(-len(batches) // pipeline.pp) - len(own))


def _sum_over_ranks(gradients: list[Tensor | None]) -> None:
    """Sum the gradients over all ranks.

    A rank's gradient covers its data, its slices of the target and its shards of the source.
    """
    present = [gradient for gradient in gradients if gradient is not None]
    flat = torch.cat([gradient.flatten() for gradient in present])
    dist.all_reduce(flat)
    for gradient, part in zip(present, flat.split([g.numel() for g in present]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _rate(learn: LearnConfig, step: int) -> float:
    schedule = ScheduleConfig(type="cosine", warmup_steps=learn.warmup_steps)
    optimizer = OptimizerConfig(lr=learn.lr, min_lr=learn.min_lr)
    return learning_rate(schedule, optimizer, step, 1, learn.steps)


def _spent(run: RunConfig, index: int, learned: LigoParameters, losses: list[float]) -> GrowthCost:
    """Return the cost of the training.

    Weights are formed once per micro-batch of the global batch; forward and backward take three
    times the FLOPs of forward. Activation checkpointing is not counted.
    """
    stage = run.stages[index]
    length = stage.data.sequence_length
    tokens = len(losses) * step_tokens(stage)
    times = len(losses) * batch_at(stage).global_batch_size // stage.batch.micro_batch_size
    making = forming_flops(learned, list(parameter_plan(stage.model, tp=1).values()))
    return GrowthCost(
        tokens,
        paper_flops_per_token(stage.model) * tokens,
        flops_per_token(stage.model, length) * tokens + 3 * making * times,
        tuple(losses),
    )


class Formed(nn.Module):
    """Module without its own weights: `form` produces them for every call."""

    def __init__(self, part: nn.Module, form: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.part = part
        self.form = form

    def forward(self, *inputs: Any) -> Tensor:
        return checkpoint(self._call, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _call(self, *inputs: Any) -> Tensor:
        return functional_call(self.part, dict(self.form()), inputs)


@dataclass(frozen=True, eq=False)
class Forming:
    """Composition of the target's weights, and their sharding."""

    learned: LigoParameters
    source: ShardedState
    settings: EngineSettings
    """Model config of the target."""
    topology: Topology
    dtype: torch.dtype
    """Dtype of forward and backward; weights are computed in that of the learnable parameters."""

    @cached_property
    def plan(self) -> dict[str, ParamSpec]:
        """Plan of the target's parameters."""
        return parameter_plan(self.settings.model, self.topology.tp)

    def weights(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Return this rank's slices of some of the target's parameters, in `dtype`. Collective.

        `names` maps the keys of the result to logical parameter names.
        """
        tp, tp_rank = self.topology.tp, self.topology.tp_rank
        specs = [self.plan[name] for name in names.values()]
        recipes = [self.learned.recipe(spec) for spec in specs]
        factors = torch.stack([recipe.alphas for recipe in recipes])
        mixed = mixtures(factors, [recipe.sources for recipe in recipes], self.source)
        found = {}
        for called, spec, recipe, matrix in zip(names, specs, recipes, mixed, strict=True):
            weight = grown_slice(spec, recipe, matrix, tp, tp_rank)
            if spec.tp_dim is None and weight.requires_grad:
                # All tensor-parallel ranks compute its full gradient, which must count once.
                weight.register_hook(lambda grad: grad / tp)
            found[called] = weight.to(self.dtype)
        return found


def formed_model(forming: Forming) -> CausalLM:
    """Return this rank's tensor-parallel slice of the target, without weights."""
    settings, topology = forming.settings, forming.topology
    parallel = settings.parallel.model_copy(
        update={
            # Each part is checkpointed as a unit, so no activation checkpointing within it.
            "activation_checkpointing": "none",
            # The weights of a part are formed on all ranks, so every rank computes all layers.
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": 1,
        }
    )
    plan = forming.plan
    model = build_model(plan, replace(settings, parallel=parallel), topology, forming.dtype)
    for part in module_names(settings.model):
        names = {n.removeprefix(f"{part}."): n for n in plan if n.startswith(f"{part}.")}
        if part == HEAD_MODULE and not names:
            names = {"weight": EMBEDDING.name}
        whole = model.get_submodule(part)
        model.set_submodule(part, Formed(whole, partial(forming.weights, names)))
    return model
