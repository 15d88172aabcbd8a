"""State of a run apart from the tensors, as saved in checkpoints."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from megagrow.common.untrusted_values import MOST, Tally, Value, as_tally, problems_of_values
from megagrow.config.data import with_stage_defaults
from megagrow.config.sections import GuardsConfig, LossSpikeConfig
from megagrow.data.stage_streams import StreamPlace
from megagrow.errors import CheckpointError
from megagrow.parallel.update_scaling import StepLimits
from megagrow.train.reporting.metrics import Counters, StepMetrics

_IndexOrNone = Annotated[int, Field(strict=True, ge=-1, le=MOST)]
"""Integer from 0, or -1 for none."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Guard:
    """Instabilities of the last steps, and the rewinds that they caused."""

    skipped: Tally = 0
    """Consecutive steps up to now that were skipped, because loss or gradient were not finite, or
    whose result cannot be used. Skipped outliers of `guards.skip_step` are no failures."""
    high: Tally = 0
    """Consecutive steps up to now whose loss was a spike."""
    losses: tuple[Value, ...] = ()
    """Last losses, in nats, from which a spike is detected; empty without `guards.loss_spike`."""
    recent_losses: tuple[Value, ...] = ()
    """Losses of the last steps, from which `guards.skip_step` detects outliers; empty without."""
    recent_norms: tuple[Value, ...] = ()
    """Gradient norms of the same steps, before clipping."""
    rewinds: Tally = 0
    """Consecutive rewinds to the same checkpoint or earlier ones."""
    rewound_to: _IndexOrNone = -1
    """Step of the checkpoint of the last rewind; -1 if there was none."""

    @property
    def troubled(self) -> bool:
        """True if the last step was skipped or a spike; its state is not a rewind target."""
        return self.skipped > 0 or self.high > 0

    def limits(self, guards: GuardsConfig) -> StepLimits | None:
        """Return the limits of the next step, None while there are too few steps.

        The rule is that of OLMo-core's `SkipStepOptimizer`: the mean plus `sigma_factor` standard
        deviations of the last steps, skipped ones included.
        """
        config = guards.skip_step
        if config is None or len(self.recent_losses) < max(2, config.window // 2):
            return None

        def limit(values: Sequence[float]) -> float:
            last = values[-config.window :]
            return statistics.fmean(last) + config.sigma_factor * statistics.stdev(last)

        return StepLimits(limit(self.recent_losses), limit(self.recent_norms))

    def after_step(
        self, guards: GuardsConfig, loss: float, skipped: bool, norm: float | None = None
    ) -> "Guard":
        """Return the guard after a step; `skipped` if its loss or gradient was not finite."""
        if skipped:
            return replace(self, skipped=self.skipped + 1)
        return self._with_recent(guards, loss, norm)._after_finite(guards, loss)

    def _with_recent(self, guards: GuardsConfig, loss: float, norm: float | None) -> "Guard":
        if guards.skip_step is None or norm is None:
            return replace(self, recent_losses=(), recent_norms=())
        window = guards.skip_step.window
        losses, norms = (*self.recent_losses, loss), (*self.recent_norms, norm)
        return replace(self, recent_losses=losses[-window:], recent_norms=norms[-window:])

    def _after_finite(self, guards: GuardsConfig, loss: float) -> "Guard":
        spike = guards.loss_spike
        if spike is None:
            return replace(self, skipped=0)
        if _is_high(spike, self.losses, loss):
            return replace(self, skipped=0, high=self.high + 1)
        losses = (*self.losses, loss)[-spike.window :]
        return replace(self, skipped=0, high=0, losses=losses)

    def after_growth(self) -> "Guard":
        """Return the guard after a growth, without the losses of the smaller model."""
        return replace(self, high=0, losses=(), recent_losses=(), recent_norms=())

    def after_rewind(self, earlier: "Guard", step: int) -> "Guard":
        """Return the guard after a rewind to the checkpoint of `step`, whose guard is `earlier`."""
        rewinds = self.rewinds + 1 if step <= self.rewound_to else 1
        return Guard(
            losses=earlier.losses,
            recent_losses=earlier.recent_losses,
            recent_norms=earlier.recent_norms,
            rewinds=rewinds,
            rewound_to=step,
        )

    def reason_to_rewind(self, guards: GuardsConfig) -> str | None:
        """Return the reason for a rewind, or None if none is due."""
        if self.skipped >= guards.max_skipped_steps:
            return f"{self.skipped} consecutive steps with a non-finite loss or gradient"
        if guards.loss_spike is not None and self.high >= guards.loss_spike.patience:
            return f"{self.high} consecutive steps with a loss spike"
        return None


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class RunState:
    """Position of a run; together with the tensors it determines every later step.

    The next step begins after `stage_tokens` tokens of stage `stage`; its batch begins at token
    `position` of the training stream. `counters.tokens` is the number of tokens of all steps plus
    `growth_tokens`. The position in a stage is counted in tokens, so that it stays valid if the run
    resumes with another batch size.
    """

    counters: Counters = field(default_factory=Counters)
    stage: Tally = 0
    stage_tokens: Tally = 0
    """Tokens trained in the stage."""
    finished_tokens: tuple[Tally, ...] = ()
    """Tokens trained in each finished stage, without those read by growths. Empty if unknown: a
    model grown outside of a run, or several growths recorded by an earlier version."""
    provenance: tuple[tuple[_IndexOrNone, ...], ...] = ()
    """For each past transition: the source layer of each new layer; empty without growth."""
    operators: tuple[tuple[str, ...], ...] = ()
    """For each past transition: its operators, which a probe chooses; empty without growth."""
    skipped_tokens: Tally = 0
    """Tokens of the stream that rewinds have skipped without training on them."""
    guard: Guard = field(default_factory=Guard)
    stage_starts: tuple[tuple[Tally, Tally], ...] = ()
    """`counters.tokens` and `position` at the start of each stage after the first, before the
    tokens that its growth reads. Zeros for stages of earlier versions, which shared one stream."""

    @property
    def place(self) -> StreamPlace:
        """Place of the next batch in the training data."""
        return StreamPlace(self.position, self.stage, self.stage_starts)

    @property
    def next_place(self) -> StreamPlace:
        """Place of the first batch of the next stage, read by its growth or its first step."""
        unknown = ((0, 0),) * (self.stage - len(self.stage_starts))
        starts = (*self.stage_starts, *unknown, (self.counters.tokens, self.position))
        return StreamPlace(self.position, self.stage + 1, starts)

    @property
    def position(self) -> int:
        """Position of the next batch in the stream. Learning rate and masks depend on
        `stage` and `stage_tokens` instead."""
        return self.counters.tokens + self.skipped_tokens

    def after_step(self, measure: StepMetrics) -> "RunState":
        """Return the state after a step."""
        counters = self.counters.after_step(measure)
        return replace(self, counters=counters, stage_tokens=self.stage_tokens + measure.tokens)

    def guarded(self, guards: GuardsConfig, measure: StepMetrics) -> "RunState":
        """Return the state after the stability guards have evaluated a step."""
        norm = measure.grad_norm
        failed = measure.skipped and not (norm is not None and math.isfinite(norm))
        guard = self.guard.after_step(guards, measure.loss, failed, norm)
        return replace(self, guard=guard)

    def unstable(self) -> "RunState":
        """Return the state with its last step counted as unstable: its result cannot be used."""
        return replace(self, guard=replace(self.guard, skipped=self.guard.skipped + 1))

    def rewound_to(self, earlier: "RunState") -> "RunState":
        """Return the state after a rewind to `earlier`; the next batch stays the same."""
        return replace(
            earlier,
            counters=replace(earlier.counters, rewinds=self.counters.rewinds + 1),
            skipped_tokens=self.position - earlier.counters.tokens,
            guard=self.guard.after_rewind(earlier.guard, earlier.counters.step),
        )

    def after_growth(
        self,
        layers: tuple[int, ...],
        operators: tuple[str, ...] = (),
        *,
        tokens: int = 0,
        flops: float = 0.0,
        flops_true: float = 0.0,
    ) -> "RunState":
        """Return the state at the start of the next stage.

        A growth that trains or measures is charged with the `tokens` that it read from the training
        stream, starting at `next_place`, and with its FLOPs by both formulas. The next stage
        begins at the following token. Tokens that several candidates read count once, their FLOPs
        each time.
        """
        return replace(
            self,
            counters=self.counters.after_growth(tokens, flops, flops_true),
            stage=self.stage + 1,
            stage_tokens=0,
            stage_starts=self.next_place.starts,
            finished_tokens=self._with_finished_stage(),
            provenance=(*self.provenance, layers),
            operators=(*self.operators, operators),
            guard=self.guard.after_growth(),
        )

    def _with_finished_stage(self) -> tuple[int, ...]:
        known = self.stage_tokens > 0 and len(self.finished_tokens) == self.stage
        return (*self.finished_tokens, self.stage_tokens) if known else ()

    def add_lost_time(self, seconds: float) -> "RunState":
        """Return the state after `seconds` of growth or checkpointing."""
        return replace(self, counters=self.counters.add_lost_time(seconds))

    def as_json(self) -> dict[str, Any]:
        """Return JSON values for the manifest of a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any], environment: Mapping[str, Any]) -> "RunState":
        """Return the state that `as_json` wrote, now or in an earlier version.

        `environment` is that of the checkpoint; earlier versions counted the steps of a stage, and
        its configuration has their size. Raises CheckpointError for values that are missing, of
        another type, or out of the range of any run.
        """
        optional = {"finished_tokens", "provenance", "operators", "skipped_tokens", "guard"}
        optional.add("stage_starts")
        try:
            known = {name: values[name] for name in ("counters", "stage")}
            known |= {name: values[name] for name in optional & values.keys()}
            state = _STATE.validate_python(
                known | {"stage_tokens": _stage_tokens(values, environment)}
            )
        except ValidationError as error:
            raise CheckpointError(
                f"the run state in the checkpoint is invalid: {problems_of_values(error)}"
            ) from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the run state in the checkpoint is incomplete ({error})"
            ) from error
        counters, prefix = state.counters, "the run state in the checkpoint is invalid"
        earlier = counters.tokens - counters.growth_tokens - state.stage_tokens
        if earlier < 0:
            raise CheckpointError(
                f"{prefix}: {state.stage_tokens} tokens of stage {state.stage} are more than the "
                f"{counters.tokens} tokens of the run"
            )
        if counters.step > counters.tokens:
            raise CheckpointError(f"{prefix}: {counters.step} steps, {counters.tokens} tokens")
        if len(state.stage_starts) > state.stage or any(
            not tokens <= min(counters.tokens, position) for tokens, position in state.stage_starts
        ):
            raise CheckpointError(f"{prefix}: starts of stages {state.stage_starts!r:.60}")
        finished = state.finished_tokens
        if finished and (len(finished) != state.stage or sum(finished) > earlier):
            raise CheckpointError(
                f"{prefix}: {earlier} tokens before stage {state.stage}, but {len(finished)} "
                f"finished stages with {sum(finished)} tokens"
            )
        if "finished_tokens" not in values and state.stage == 1 and earlier > 0:
            return replace(state, finished_tokens=(earlier,))
        return state


_STATE: TypeAdapter[RunState] = TypeAdapter(RunState)


def _stage_tokens(values: Mapping[str, Any], environment: Mapping[str, Any]) -> Any:
    """Return the tokens trained in the stage, computed from its steps for an earlier version."""
    if "stage_tokens" in values:
        return values["stage_tokens"]
    if values["stage_step"] == 0:
        return 0
    if values["stage"] == 0:  # exact even if the batch size has changed
        return values["counters"]["tokens"]
    stage = with_stage_defaults(environment["config"])["stages"][values["stage"]]
    batch = stage["batch"]["global_batch_size"]
    sizes = (values["stage_step"], batch, stage["data"]["sequence_length"])
    return math.prod(map(as_tally, sizes))


def _is_high(spike: LossSpikeConfig, losses: tuple[float, ...], loss: float) -> bool:
    if len(losses) < spike.window:
        return False
    deviation = statistics.stdev(losses)
    return math.isfinite(loss) and loss > statistics.fmean(losses) + spike.zscore * deviation
