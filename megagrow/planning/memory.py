"""Memory of a rank of a stage, from the layout and estimates.

State and weights follow from the layout of the stage. Gradients are the allocations of
`parallel.replicated` under ZeRO 0 and `parallel.flat_gradients` under ZeRO 1 and 2, else those of
DeepSpeed 0.19, from its code.
Activations and logits are the tensors kept by autograd (`activations`). The peak of a step is
reached at the loss (`at_loss`) or at its end (`at_end`).
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from megagrow.config.deepspeed import DeepSpeedConfig, DeepSpeedZeroConfig
from megagrow.config.schema import StageConfig
from megagrow.model.layers.base import READS_RESIDUAL
from megagrow.parallel.engine_config import GATHER_BYTES, reduce_bucket
from megagrow.planning.activations import Activations
from megagrow.reshard.exchange import BUCKET_BYTES
from megagrow.reshard.layout import Layout, layout_of


def zero3_options(stage: StageConfig) -> DeepSpeedZeroConfig:
    """Return the options that a stage passes to DeepSpeed's ZeRO 3."""
    return (stage.deepspeed or DeepSpeedConfig()).zero_optimization


@dataclass(frozen=True)
class StageMemory:
    """Memory of a stage in bytes, for the rank with the largest share of each part."""

    stage: StageConfig
    layout: Layout
    bf16: bool
    on_cpu: bool = False

    @property
    def state(self) -> int:
        """Bytes of fp32 master weights and optimizer state."""
        return max(self._state)

    @property
    def weights(self) -> int:
        """Bytes of forward weights, if they are not the master weights themselves; with hpZ two
        copies.

        ZeRO 0 has none in fp32, and the copies of autocast in bf16. ZeRO 3 has none in fp32 either,
        unless the master weights are on the CPU (`parallel.engine_build`). On CPUs of one host the
        data-parallel ranks of ZeRO 1 and 2 map the same weights (`parallel.materialize`): they
        count in the resident memory of each rank, but the host holds one copy per slice.
        """
        size = self.stage.parallel.zero_hpz_partition_size
        secondary = self._width * self._slice // size if size > 1 else 0
        if self._masters_compute:
            return secondary
        return self._width * (self._most if self._zero == 3 else self._slice) + secondary

    @property
    def gathered(self) -> int:
        """Maximum bytes of weights gathered by ZeRO-3 from other ranks."""
        alone = self.layout.dp == 1  # parameters are complete and not copied
        if self._zero < 3 or alone:
            return 0
        live = zero3_options(self.stage).stage3_max_live_parameters
        return self._width * min(self._slice, live)

    @property
    def gradients(self) -> int:
        """Bytes of the fp32 gradients: of the slice, or from ZeRO 2 on of this rank's share."""
        return 4 * (self._slice if self._zero < 2 else self._most)

    @property
    def buckets(self) -> int:
        """Bytes of buffers while gradients are reduced.

        ZeRO 0 reduces in place, and copies the gradients for another data type. ZeRO 3 collects
        them in a bucket of that data type and copies the bucket, once more by gloo, used without
        a GPU. ZeRO 1 and 2 hold gradients as autograd returns them, those of the matrices that
        read the input of a block together (`model.layers.linears`), and staging buckets.
        """
        if self._zero == 0:
            converts = self._communicated < 4  # the weights are fp32, also under autocast
            return self._communicated * self._slice if converts and self.layout.dp > 1 else 0
        if self._zero == 3:
            return self._communicated * (2 + self.on_cpu) * self._bucket
        together: Counter[str] = Counter()
        for name, spec in self.layout.plan.items():
            if not spec.is_vector:
                block = name.rsplit(".", 2)[0] if spec.col_role == READS_RESIDUAL else name
                together[block] += spec.slice_numel(self.layout.tp)
        return self._width * max(together.values()) + self._staged

    @property
    def gradients_kept(self) -> int:
        """Bytes of gradients and buckets that exist during the forward pass of a micro-batch."""
        if self._zero == 0:
            return self.gradients if self._accumulates else 0
        bucket = self._communicated * self._bucket if self._zero == 3 else self._staged
        return self.gradients + bucket

    def activations(self, checkpointing: str | None = None) -> int:
        """Return the bytes kept for the backward pass, by default with the stage's settings."""
        return self._parts.at_loss(checkpointing or self.stage.parallel.activation_checkpointing)

    @property
    def logits(self) -> int:
        """Bytes of head and loss: logits and temporaries of the loss.

        With `linear_cross_entropy`, one chunk of them and the gradients.
        """
        return self._parts.logits

    @property
    def at_loss(self) -> int:
        """Total bytes when the loss is computed, when activations peak."""
        kept = self.state + self.weights + self.gathered + self.gradients_kept
        return kept + self.activations() + self.logits

    @property
    def at_end(self) -> int:
        """Total bytes at the end of the backward pass or at the update, whichever is larger.

        At the end of the backward pass gradients are reduced, the activations of the first layer
        remain, and ZeRO 3 has released gathered weights. After the update, ZeRO 1 and 2 gather the
        forward weights, which takes a copy on CPUs of several hosts.
        """
        gathered = 0
        if self._zero in (1, 2) and self.on_cpu and self.layout.dp > 1:
            gathered = min(GATHER_BYTES, self._width * self._slice)
        reduction = self.buckets + self._parts.largest_layer
        return self.state + self.weights + self.gradients + max(reduction, gathered)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, and of both candidates for the peak of a step."""
        return {
            "state": self.state,
            "weights": self.weights,
            "gathered": self.gathered,
            "gradients": self.gradients,
            "buckets": self.buckets,
            "activations": self.activations("none"),
            "activations_selective": self.activations("selective"),
            "activations_full": self.activations("full"),
            "logits": self.logits,
            "at_loss": self.at_loss,
            "at_end": self.at_end,
            "peak": self.training,
        }

    @property
    def training(self) -> int:
        """Peak bytes of a step."""
        return max(self.at_loss, self.at_end)

    def share(self, rank: int) -> int:
        """Return the bytes of `rank` before the first step.

        These are state, forward weights, and the gradients that ZeRO 3 allocates at construction.
        """
        held = self.held(rank)
        weights, gradients = self._width * self._slice, 0
        if self._zero == 0:
            weights = 0
        elif self._zero == 3:
            weights, gradients = 0 if self._masters_compute else self._width * held, 4 * held
        return self.state_of(rank) + weights + gradients

    def held(self, rank: int) -> int:
        """Return the elements of optimizer state on a rank, without padding."""
        return self._held[rank // self.layout.tp]

    def state_of(self, rank: int) -> int:
        """Return the bytes of fp32 weights and optimizer state on a rank, without padding."""
        return self._state[rank // self.layout.tp]

    @property
    def fullest_rank(self) -> int:
        """First rank with the largest share of the optimizer state."""
        return self._held.index(self._most) * self.layout.tp

    @cached_property
    def _held(self) -> list[int]:
        """Elements on the first of each group of tensor-parallel ranks; equal on all of them."""
        return [
            sum(len(self.layout.interval(name, rank)) for name in self.layout.plan)
            for rank in range(0, self.layout.world_size, self.layout.tp)
        ]

    @cached_property
    def _state(self) -> list[int]:
        """Bytes of state of these ranks."""
        return [
            sum(
                4 * len(spec.kinds) * len(self.layout.interval(name, rank))
                for name, spec in self.layout.plan.items()
            )
            for rank in range(0, self.layout.world_size, self.layout.tp)
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
        """True if the optimizer's fp32 weights are also the forward weights."""
        one_tensor = self._zero == 3 and not self.stage.parallel.offload_optimizer
        return not self.bf16 and (self._zero == 0 or one_tensor)

    @property
    def _width(self) -> int:
        """Bytes per element in the forward pass."""
        return 2 if self.bf16 else 4

    @property
    def _communicated(self) -> int:
        return self.stage.parallel.communication_bytes

    @property
    def _bucket(self) -> int:
        """Elements of gradients reduced at a time."""
        return reduce_bucket(self.layout.plan, self.layout.tp, self._zero)

    @property
    def _staged(self) -> int:
        """Bytes of the two staging buckets of ZeRO 1 and 2 (`parallel.bucket_reduction`)."""
        staged = self.layout.dp > 1 and (self._zero == 2 or self._communicated == 2)
        return 2 * self._communicated * self._bucket if staged else 0

    @property
    def _accumulates(self) -> bool:
        batch = self.stage.batch
        return batch.global_batch_size > batch.micro_batch_size * self.layout.dp

    @cached_property
    def _parts(self) -> Activations:
        return Activations(self.stage, self.layout, self.bf16, self.on_cpu)


def stage_memory(
    stage: StageConfig, world_size: int, bf16: bool, on_cpu: bool = False
) -> StageMemory:
    """Return the memory of a stage on `world_size` ranks, which must be valid for its settings.

    `on_cpu`: ranks without a GPU.
    """
    # Scales of an exact continuation split groups; shards then differ by a few padding elements.
    return StageMemory(stage, layout_of(stage, world_size, {}), bf16, on_cpu)


def growth_peak(source: StageMemory, target: StageMemory) -> int:
    """Return the peak bytes of a growth over ranks: source shard, target shard and one bucket.

    The additional parameter that dense operators hold is not included.
    """
    ranks = range(target.layout.world_size)
    shares = (source.state_of(rank) + target.share(rank) for rank in ranks)
    return max(shares) + BUCKET_BYTES
