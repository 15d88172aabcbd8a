"""What a rank of a stage holds, before there is one: from the layout, and estimates beside it.

State and weights follow from the layout that the stage will have. Gradients are what DeepSpeed 0.19
allocates, by its code. Activations and logits are estimates: what the backward pass needs of the
eager model, with fused norms and attention that keep no S x S matrix.
"""

from dataclasses import dataclass
from functools import cached_property

from megagrow.config.schema import StageConfig
from megagrow.parallel.plan import parameter_plan
from megagrow.parallel.settings import parameter_groups, reduce_bucket
from megagrow.reshard.exchange import BUCKET_BYTES
from megagrow.reshard.layout import Layout

STATE_BYTES = 12
"""Of each parameter: fp32 master weight, exp_avg, exp_avg_sq."""

LIVE_PARAMETERS = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""


@dataclass(frozen=True)
class StageMemory:
    """What a rank of a stage holds, in bytes: that rank which holds most of each part."""

    stage: StageConfig
    layout: Layout
    sequence_length: int
    bf16: bool

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
        return self._width * min(self._slice, LIVE_PARAMETERS) if self._zero == 3 else 0

    @property
    def gradients(self) -> int:
        """Gradients, those that are summed up in fp32 included, and the bucket they travel in."""
        bucket = self._width * reduce_bucket(self.layout.plan, self.layout.tp)
        if self._zero == 0:
            return 4 * self._slice
        if self._zero == 1:
            return self._width * self._slice + (4 * self._slice if self.bf16 else 4 * self._most)
        return 4 * self._most + bucket

    @property
    def activations(self) -> int:
        """Estimate of what all layers keep for the backward pass, nothing computed twice."""
        return self.stage.model.num_hidden_layers * self._layer + self._ends

    @property
    def activations_checkpointed(self) -> int:
        """The same with `activation_checkpointing: full`: each layer's input, and one layer."""
        inputs = self.stage.model.num_hidden_layers * self._residual
        return inputs + self._layer + self._ends

    @property
    def activations_used(self) -> int:
        """The one of the two that the stage's settings ask for. `selective` saves what attention
        keeps by S x S, which no fused attention does: it counts as none."""
        full = self.stage.parallel.activation_checkpointing == "full"
        return self.activations_checkpointed if full else self.activations

    @property
    def logits(self) -> int:
        """Estimate: logits, and the fp32 tensors of their shape that the eager loss has at once."""
        spec = self.layout.plan["model.embed_tokens.weight"]
        in_fp32 = 3 if self.bf16 else 2
        return self._tokens * spec.padded_rows // self.layout.tp * (self._width + 4 * in_fp32)

    @property
    def training(self) -> int:
        """All of it together while a step is trained."""
        kept = self.state + self.weights + self.gathered + self.gradients
        return kept + self.activations_used + self.logits

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
    def _width(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.bf16 else 4

    @property
    def _tokens(self) -> int:
        """Tokens of a micro batch."""
        return self.stage.batch.micro_batch_size * self.sequence_length

    @property
    def _residual(self) -> int:
        """Bytes of the residual stream of a micro batch, as it stands between two blocks."""
        split = self.layout.tp if self.stage.parallel.sequence_parallel else 1
        return self._tokens * self.stage.model.hidden_size * self._width // split

    @property
    def _ends(self) -> int:
        """Around the layers: the input of the last norm, and that of the head."""
        return self._residual + self._tokens * self.stage.model.hidden_size * self._width

    @property
    def _layer(self) -> int:
        """Of one layer. Per token: the inputs of both norms and what comes out of them; q, k, v,
        the attention's result and its fp32 normaliser for each head; gate, silu(gate), up and their
        product. Split over tensor parallelism, but for the norms' results, which are whole."""
        model = self.stage.model
        heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
        sliced = heads * model.head_dim + 4 * model.intermediate_size
        normaliser = 4 * model.num_attention_heads
        per_token = (sliced * self._width + normaliser) // self.layout.tp
        normed = 2 * model.hidden_size * self._width
        return 2 * self._residual + self._tokens * (normed + per_token)


def stage_memory(
    stage: StageConfig, world_size: int, sequence_length: int, bf16: bool
) -> StageMemory:
    """The memory of a stage on so many ranks, which its settings must fit."""
    parallel = stage.parallel
    tp = parallel.tensor_model_parallel_size
    plan = parameter_plan(stage.model, tp)
    # The scales of an exact continuation split groups: shares differ by a few elements of padding.
    groups = tuple(group.names for group in parameter_groups(plan, stage.optimizer, {}))
    layout = Layout(plan, groups, parallel.zero_stage, world_size // tp, tp)
    return StageMemory(stage, layout, sequence_length, bf16)


def growth_peak(source: StageMemory, target: StageMemory) -> int:
    """Bytes of the rank that holds most while a growth goes on: its part of the source's state, its
    share of the target, and one bucket. Dense operators hold one parameter more."""
    world = target.layout.dp * target.layout.tp
    shares = (STATE_BYTES * source.held(rank) + target.share(rank) for rank in range(world))
    return max(shares) + BUCKET_BYTES
