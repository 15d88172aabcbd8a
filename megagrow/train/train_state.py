"""Where a run stands: all that a checkpoint needs besides the tensors, as one value."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megagrow.config.sections import GuardsConfig
from megagrow.errors import ConfigError
from megagrow.train.fault_tolerance.stability import Guard
from megagrow.train.reporting.metrics import Counters, StepMetrics


@dataclass(frozen=True)
class RunState:
    """The next step is step `stage_step` of stage `stage`; its batch begins at token `position` of
    the training stream. Nothing else decides what a run does next.

    `counters.tokens` are the tokens of all steps, and the `growth_tokens`."""

    counters: Counters = field(default_factory=Counters)
    stage: int = 0
    stage_step: int = 0
    provenance: tuple[tuple[int, ...], ...] = ()
    """For each growth so far: for each new layer the layer that it was copied from."""
    operators: tuple[tuple[str, ...], ...] = ()
    """For each growth so far: by which operators; a probe chooses them while the run goes on."""
    skipped_tokens: int = 0
    """Tokens of the stream that rewinds have put behind the run, though it was not trained on
    them."""
    guard: Guard = field(default_factory=Guard)

    @property
    def position(self) -> int:
        """Where in the stream the next batch begins. What depends on tokens trained, as the
        learning rate and masks, goes by `counters.tokens` instead."""
        return self.counters.tokens + self.skipped_tokens

    def after_step(self, measure: StepMetrics) -> "RunState":
        """The state when a step is done."""
        counters = self.counters.after_step(measure)
        return replace(self, counters=counters, stage_step=self.stage_step + 1)

    def guarded(self, guards: GuardsConfig, measure: StepMetrics) -> "RunState":
        """The state when the guards have seen the step that was done."""
        guard = self.guard.after_step(guards, measure.loss, measure.skipped)
        return replace(self, guard=guard)

    def rewound_to(self, earlier: "RunState") -> "RunState":
        """The state when the run went back to an earlier one; its next batch stays the next."""
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
        """The state at the start of the next stage.

        A growth that trains or measures is charged with the `tokens` that it took from the training
        stream, from `counters.tokens` on, and with its FLOPs by both accounts: the next stage
        begins with the very next token. Tokens that several candidates read in turn count once,
        their FLOPs each time.
        """
        return replace(
            self,
            counters=self.counters.after_growth(tokens, flops, flops_true),
            stage=self.stage + 1,
            stage_step=0,
            provenance=(*self.provenance, layers),
            operators=(*self.operators, operators),
            guard=self.guard.after_growth(),
        )

    def add_lost_time(self, seconds: float) -> "RunState":
        """The state when `seconds` went into a growth or a checkpoint."""
        return replace(self, counters=self.counters.add_lost_time(seconds))

    def as_json(self) -> dict[str, Any]:
        """Plain values for the manifest of a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "RunState":
        """The inverse of `as_json`. InputError for values that it cannot have written."""
        try:
            counters = Counters(**values["counters"])
            guard = Guard.from_json(values.get("guard", {}))
            skipped = values.get("skipped_tokens", 0)
            lists = {
                name: tuple(tuple(found) for found in values.get(name, ()))
                for name in ("provenance", "operators")
            }
            whole = [values["stage"], values["stage_step"], counters.step, counters.tokens, skipped]
            sums = [value for value in asdict(counters).values() if type(value) in (int, float)]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"the checkpoint does not say where its run stands ({error})"
            ) from error
        wrong = [value for value in whole if type(value) is not int or value < 0]
        if wrong or len(sums) < len(asdict(counters)):
            raise ConfigError(
                "the checkpoint does not say where its run stands: its counters are not numbers"
            )
        stage, step = values["stage"], values["stage_step"]
        return RunState(counters, stage, step, **lists, skipped_tokens=skipped, guard=guard)
