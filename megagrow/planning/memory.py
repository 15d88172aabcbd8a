"""Memory of a pipeline rank of a stage, from the layout and estimates.

State and weights follow from the layout of the stage. Gradients are the allocations of
`parallel.replicated` under ZeRO 0 and `parallel.flat_gradients` under ZeRO 1 and 2, else those of
DeepSpeed 0.19, from its code.
Activations and logits are the tensors kept by autograd (`activations`). The peak of a step is
reached at the loss (`at_loss`) or at its end (`at_end`).
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from megagrow.config.deepspeed import DeepSpeedConfig, DeepSpeedZeroConfig
from megagrow.config.schema import StageConfig
from megagrow.model.layers.base import READS_RESIDUAL
from megagrow.model.layers.table import EMBEDDING
from megagrow.parallel.engine_config import GATHER_BYTES, reduce_bucket
from megagrow.parallel.sharding import Partition
from megagrow.planning.activations import Activations
from megagrow.reshard.layout import Layout, layout_of


def zero3_options(stage: StageConfig) -> DeepSpeedZeroConfig:
    """Return the options that a stage passes to DeepSpeed's ZeRO 3."""
    return (stage.deepspeed or DeepSpeedConfig()).zero_optimization


@dataclass(frozen=True)
class StageMemory:
    """Memory of one pipeline rank of a stage in bytes.

    Each part is that of the rank with the largest share, among the data-, context- and
    tensor-parallel ranks of the pipeline rank.
    """

    stage: StageConfig
    layout: Layout
    bf16: bool
    on_cpu: bool = False
    pp_rank: int = 0

    @cached_property
    def pipeline_ranks(self) -> "tuple[StageMemory, ...]":
        """Memory of every pipeline rank."""
        return tuple(replace(self, pp_rank=rank) for rank in range(self.layout.pp))

    @property
    def at_peak(self) -> "StageMemory":
        """Memory of the pipeline rank with the highest peak."""
        return max(self.pipeline_ranks, key=lambda memory: memory.training)

    def at_rank(self, rank: int) -> "StageMemory":
        """Return the memory of the pipeline rank to which a rank belongs."""
        return self.pipeline_ranks[rank // (self.layout.dp * self.layout.tp)]

    @cached_property
    def part(self) -> Partition:
        """Partition of the parameters of the pipeline rank over its ranks."""
        return self.layout.pipeline_parts[self.pp_rank]

    @property
    def state(self) -> int:
        """Bytes of fp32 master weights and optimizer state."""
        return max(size for _, size in self._shares)

    @property
    def weights(self) -> int:
        """Bytes of forward weights, if they are not the master weights themselves; with hpZ two
        copies.

        ZeRO 0 has none in fp32, and the copies of autocast in bf16. ZeRO 3 has none in fp32 either,
        unless the master weights are on the CPU (`parallel.engine_build`). On CPUs of one host the
        data-parallel ranks of ZeRO 1 and 2 map the same weights (`parallel.materialize`): they
        count in the resident memory of each rank, but the host holds one copy per slice.
        """
        autocast = self._width if self._zero == 0 and self.bf16 else 0
        copy = self._copy_bytes + autocast * self._tied_copy
        size = self.stage.parallel.zero_hpz_partition_size
        secondary = self._width * self._slice // size if size > 1 else 0
        if self._masters_compute:
            return secondary + copy
        held = self._most if self._zero == 3 else self._slice
        return self._width * held + secondary + copy

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
        """Bytes of the fp32 gradients: of the slice, or from ZeRO 2 on of this rank's share, and of
        the copy of a tied head (`parallel.pipeline.tied_head`)."""
        return 4 * ((self._slice if self._zero < 2 else self._most) + self._tied_copy)

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
        for name, spec in self.part.plan.items():
            if not spec.is_vector:
                block = name.rsplit(".", 2)[0] if spec.col_role == READS_RESIDUAL else name
                together[block] += spec.slice_numel(self.layout.tp)
        return self._width * max(together.values()) + self._staged

    @property
    def gradients_kept(self) -> int:
        """Bytes of gradients and buckets that exist during the forward pass of a micro-batch."""
        if self._zero == 0:
            return self.gradients if self._accumulates else 4 * self._tied_copy
        bucket = self._communicated * self._bucket if self._zero == 3 else self._staged
        return self.gradients + bucket

    def activations(self, checkpointing: str | None = None) -> int:
        """Return the bytes kept for backward passes, by default with the stage's settings."""
        return self._parts.kept(checkpointing or self.stage.parallel.activation_checkpointing)

    @property
    def logits(self) -> int:
        """Bytes of head and loss: logits and temporaries of the loss.

        With `linear_cross_entropy`, one chunk of them and the gradients. Only the last pipeline
        rank has them.
        """
        return self._parts.logits

    @property
    def at_loss(self) -> int:
        """Total bytes when activations peak: at the loss, or on other pipeline ranks with the most
        micro-batches in flight."""
        kept = self.state + self.weights + self.gathered + self.gradients_kept
        return kept + self._parts.at_loss(self.stage.parallel.activation_checkpointing)

    @property
    def at_end(self) -> int:
        """Total bytes at the end of the backward pass or at the update, whichever is larger.

        At the end of the backward pass gradients are reduced, the activations of the first layer
        remain, and ZeRO 3 has released gathered weights. After the update, ZeRO 1 and 2 gather the
        forward weights, which takes a copy on CPUs of several hosts. The first pipeline rank
        receives the gradient of a tied head.
        """
        gathered = 0
        if self._zero in (1, 2) and self.on_cpu and self.layout.dp > 1:
            gathered = min(GATHER_BYTES, self._width * self._slice)
        reduction = self.buckets + self._parts.at_end
        received = 4 * self._tied_slice if self.pp_rank == 0 else 0
        return self.state + self.weights + self.gradients + max(reduction, gathered, received)

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
        memory, held = self.at_rank(rank), self.held(rank)
        weights, gradients = memory._width * memory._slice, 4 * memory._tied_copy
        if self._zero == 0:
            weights = 0
        elif self._zero == 3:
            weights, gradients = 0 if self._masters_compute else self._width * held, 4 * held
        return self.state_of(rank) + weights + memory._copy_bytes + gradients

    def held(self, rank: int) -> int:
        """Return the elements of optimizer state on a rank, without padding."""
        return self._share_of(rank)[0]

    def state_of(self, rank: int) -> int:
        """Return the bytes of fp32 weights and optimizer state on a rank, without padding."""
        return self._share_of(rank)[1]

    @property
    def fullest_rank(self) -> int:
        """First rank of the pipeline rank with the largest share of the optimizer state."""
        dp_rank = next(i for i, (numel, _) in enumerate(self._shares) if numel == self._most)
        return (self.pp_rank * self.layout.dp + dp_rank) * self.layout.tp

    def _share_of(self, rank: int) -> tuple[int, int]:
        return self.at_rank(rank)._shares[rank // self.layout.tp % self.layout.dp]

    @cached_property
    def _shares(self) -> list[tuple[int, int]]:
        """Elements and bytes of the optimizer state by data-parallel rank; equal on all
        tensor-parallel ranks."""
        return self.part.shares

    @cached_property
    def _most(self) -> int:
        return max(numel for numel, _ in self._shares)

    @cached_property
    def _slice(self) -> int:
        """Elements of the pipeline rank's parameters on one tensor-parallel rank."""
        return sum(spec.slice_numel(self.layout.tp) for spec in self.part.plan.values())

    @property
    def _tied_slice(self) -> int:
        """Elements of the embedding on one tensor-parallel rank, if the head on another pipeline
        rank has a copy of it; else 0."""
        copied = self.stage.model.tie_word_embeddings and self.layout.pp > 1
        return self.layout.plan[EMBEDDING.name].slice_numel(self.layout.tp) if copied else 0

    @property
    def _tied_copy(self) -> int:
        """Elements of the copy of the embedding on the last pipeline rank; else 0."""
        return self._tied_slice if self.pp_rank == self.layout.pp - 1 else 0

    @property
    def _copy_bytes(self) -> int:
        """Bytes of the forward weights of the copy; under ZeRO 0 they are fp32."""
        return self._tied_copy * (4 if self._zero == 0 else self._width)

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
        return reduce_bucket(self.part.plan, self.layout.tp, self._zero)

    @property
    def _staged(self) -> int:
        """Bytes of the two staging buckets of ZeRO 1 and 2 (`parallel.bucket_reduction`)."""
        staged = self.layout.dp > 1 and (self._zero == 2 or self._communicated == 2)
        return 2 * self._communicated * self._bucket if staged else 0

    @property
    def _accumulates(self) -> bool:
        replicas = self.layout.dp // self.stage.parallel.context_parallel_size
        batch = self.stage.batch
        return batch.global_batch_size > batch.micro_batch_size * replicas

    @cached_property
    def _parts(self) -> Activations:
        return Activations(self.stage, self.layout, self.bf16, self.on_cpu, self.pp_rank)


def stage_memory(
    stage: StageConfig, world_size: int, bf16: bool, on_cpu: bool = False
) -> StageMemory:
    """Return the memory of a stage on `world_size` ranks, which must be valid for its settings.

    It is that of the pipeline rank with the highest peak. `on_cpu`: ranks without a GPU.
    """
    # Scales of an exact continuation split groups; shards then differ by a few padding elements.
    return StageMemory(stage, layout_of(stage, world_size, {}), bf16, on_cpu).at_peak
