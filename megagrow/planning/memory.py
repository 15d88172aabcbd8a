"""What a rank of a stage holds, before there is one: from the layout, and estimates beside it.

State and weights follow from the layout that the stage will have. Gradients are what DeepSpeed 0.19
allocates, by its code. Activations and logits are what autograd keeps (`activations`). A step has
two moments that can be its highest: `at_loss` and `at_end`.
"""

from dataclasses import dataclass
from functools import cached_property

from megagrow.config.schema import StageConfig
from megagrow.parallel.engine_config import parameter_groups, reduce_bucket
from megagrow.parallel.sharding import STATE_KINDS, parameter_plan
from megagrow.planning.activations import Activations
from megagrow.reshard.exchange import BUCKET_BYTES
from megagrow.reshard.layout import Layout

STATE_BYTES = 4 * len(STATE_KINDS)
"""Bytes of the fp32 states of a parameter element."""

LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""

STAGE_0_BUCKET = 500_000_000
"""Elements that DeepSpeed without ZeRO reduces at once (its MEMORY_OPT_ALLREDUCE_SIZE)."""


@dataclass(frozen=True)
class StageMemory:
    """What a rank of a stage holds, in bytes: that rank which holds most of each part."""

    stage: StageConfig
    layout: Layout
    sequence_length: int
    bf16: bool
    on_cpu: bool = False

    @property
    def state(self) -> int:
        """fp32 master weights and Adam's two moments."""
        return STATE_BYTES * self._most

    @property
    def weights(self) -> int:
        """Weights of the forward pass, where they are not the masters themselves.

        ZeRO 0 has none in fp32, and in bf16 those that autocast makes; ZeRO 3 has none in fp32
        either, unless the masters lie on the CPU (`parallel.empty_engine`).
        """
        if self._masters_compute:
            return 0
        return self._width * (self._most if self._zero == 3 else self._slice)

    @property
    def gathered(self) -> int:
        """Weights that ZeRO-3 has gathered from the other ranks, at most."""
        alone = self.layout.dp == 1  # what it holds is whole already, and not copied
        if self._zero < 3 or alone:
            return 0
        return self._width * min(self._slice, LIVE_PARAMETERS)

    @property
    def gradients(self) -> int:
        """Gradients when the backward pass ends, the fp32 sum of bf16 ones included."""
        if self._zero < 2:
            summed = 4 * self._slice if self._zero == 1 and self.bf16 else 0
            return self._grad_width * self._slice + summed
        return 4 * self._most

    @property
    def buckets(self) -> int:
        """What gradients are reduced in: a flat copy of as many as are reduced at once, and from
        ZeRO 2 on also the bucket that they are collected in. Gloo, which ranks without a GPU use,
        scatters by way of one more copy (ZeRO 3)."""
        if self._zero == 0:
            return 4 * min(self._slice, STAGE_0_BUCKET)
        return (1, 2, 3 if self.on_cpu else 2)[self._zero - 1] * self._bucket

    @property
    def gradients_kept(self) -> int:
        """Gradients, and their bucket, that are there while a micro batch goes forward: what is
        allocated for good, and the sum over the micro batches before it."""
        if self._zero == 3:
            return self.gradients + self._bucket
        if self._zero == 1 and self.bf16:
            return 4 * self._slice
        if self._zero == 2 and self._accumulates:
            return 4 * self._most
        summed = 4 * self._slice if self._zero < 2 and self._accumulates else 0
        return summed + self._flat_kept

    @property
    def activations(self) -> int:
        """What all layers keep for the backward pass, nothing computed twice."""
        return self._parts.all_layers

    @property
    def activations_checkpointed(self) -> int:
        """The same with `activation_checkpointing: full`: each layer's input."""
        return self._parts.inputs_only

    @property
    def activations_used(self) -> int:
        """What is kept by the stage's settings."""
        return self._parts.used

    @property
    def logits(self) -> int:
        """Head and loss: logits and what the loss computes of them at once, or with
        `linear_cross_entropy` a chunk of that, and the gradients that are made with it."""
        return self._parts.logits

    @property
    def at_loss(self) -> int:
        """All of it where the loss is computed: activations are most then."""
        kept = self.state + self.weights + self.gathered + self.gradients_kept
        return kept + self.activations_used + self.logits

    @property
    def at_end(self) -> int:
        """All of it where the backward pass ends: gradients are reduced, and of the activations
        those of the first layer are left; ZeRO 3 has let go of what it had gathered. Or, if that is
        more, where the weights are updated: ZeRO 1 and 2 make one flat gradient of this rank's
        part."""
        gradients = self.gradients
        at_once = self._width * self._slice <= self._bucket
        if self._zero == 2 and at_once and not self._accumulates:
            gradients = 0  # all of them are still in the bucket
        reduction = gradients + self.buckets + self._parts.first_layer
        if self._zero == 1 or gradients == 0:
            reduction += self._flat_kept
        flattened = 4 * self._most if self._zero in (1, 2) else 0
        return self.state + self.weights + max(reduction, self.gradients + flattened)

    @property
    def training(self) -> int:
        """The most that a step holds at once."""
        return max(self.at_loss, self.at_end)

    def share(self, rank: int) -> int:
        """What `rank` holds of the stage before its first step: state, forward weights, and the
        gradients that DeepSpeed allocates at once."""
        held = self.held(rank)
        weights, gradients = self._width * self._slice, 0
        if self._zero == 0:
            weights = 0
        elif self._zero == 1 and self.bf16:
            gradients = 4 * self._slice
        elif self._zero == 3:
            weights, gradients = 0 if self._masters_compute else self._width * held, 4 * held
        return STATE_BYTES * held + weights + gradients

    def held(self, rank: int) -> int:
        """Elements of the optimizer's state on a rank, padding left out."""
        return self._held[rank // self.layout.tp]

    @cached_property
    def _held(self) -> list[int]:
        """Elements on each data-parallel rank; tensor-parallel ranks hold equally many."""
        return [
            sum(len(self.layout.interval(name, dp_rank)) for name in self.layout.plan)
            for dp_rank in range(self.layout.dp)
        ]

    @property
    def _most(self) -> int:
        return max(self._held)

    @cached_property
    def _slice(self) -> int:
        """Elements of the model on one tensor-parallel rank."""
        return sum(spec.slice_numel(self.layout.tp) for spec in self.layout.plan.values())

    @property
    def _zero(self) -> int:
        return self.layout.zero_stage

    @property
    def _masters_compute(self) -> bool:
        """Whether the optimizer's fp32 weights are those of the forward pass at once."""
        one_tensor = self._zero == 3 and not self.stage.parallel.offload_optimizer
        return not self.bf16 and (self._zero == 0 or one_tensor)

    @property
    def _flat_kept(self) -> int:
        """The sums of gradients that are kept from step to step (`parallel.flat_gradients`)."""
        summed = self._zero in (1, 2) and not self.bf16 and self.on_cpu
        return 4 * self._most if summed and not self.stage.parallel.offload_optimizer else 0

    @property
    def _width(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.bf16 else 4

    @property
    def _grad_width(self) -> int:
        """Bytes of a gradient as autograd makes it; under autocast (ZeRO 0) weights are fp32."""
        return 4 if self._zero == 0 else self._width

    @property
    def _bucket(self) -> int:
        return self._width * reduce_bucket(self.layout.plan, self.layout.tp)

    @property
    def _accumulates(self) -> bool:
        batch = self.stage.batch
        return batch.global_batch_size > batch.micro_batch_size * self.layout.dp

    @cached_property
    def _parts(self) -> Activations:
        return Activations(self.stage, self.layout, self.sequence_length, self.bf16, self.on_cpu)


def stage_memory(
    stage: StageConfig, world_size: int, sequence_length: int, bf16: bool, on_cpu: bool = False
) -> StageMemory:
    """The memory of a stage on so many ranks, which its settings must fit; `on_cpu` ranks have no
    GPU."""
    parallel = stage.parallel
    tp = parallel.tensor_model_parallel_size
    plan = parameter_plan(stage.model, tp)
    # The scales of an exact continuation split groups: shares differ by a few elements of padding.
    groups = tuple(group.names for group in parameter_groups(plan, stage.optimizer, {}))
    layout = Layout(plan, groups, parallel.zero_stage, world_size // tp, tp)
    return StageMemory(stage, layout, sequence_length, bf16, on_cpu)


def growth_peak(source: StageMemory, target: StageMemory) -> int:
    """Bytes of the rank that holds most while a growth goes on: its part of the source's state, its
    share of the target, and one bucket. Dense operators hold one parameter more."""
    world = target.layout.dp * target.layout.tp
    shares = (STATE_BYTES * source.held(rank) + target.share(rank) for rank in range(world))
    return max(shares) + BUCKET_BYTES
