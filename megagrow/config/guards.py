"""What a run does when something goes wrong while nobody looks: every key of `guards`."""

from pydantic import Field

from megagrow.config.sections import Count, Section


class LossSpikeConfig(Section):
    """When a loss counts as a spike: it lies `zscore` standard deviations above the mean of the
    last `window` losses, and those of the `patience` - 1 steps before it did so too."""

    window: int = Field(default=100, ge=2)
    """In steps; what is itself that high does not enter it, and a growth begins it anew."""
    zscore: float = Field(default=6.0, gt=0)
    """How many standard deviations above the mean a loss has to lie."""
    patience: Count = 3
    """How many steps in a row have to lie there."""


class GuardsConfig(Section):
    """Steps that are not finite, loss spikes, and ranks that hang
    (docs/guides/fault-tolerance.md)."""

    max_skipped_steps: Count = 3
    """After so many steps in a row whose loss or gradient is not finite the run rewinds."""
    max_rewinds: int = Field(default=3, ge=0)
    """After so many rewinds to the same checkpoint, or to earlier ones, the run ends."""
    loss_spike: LossSpikeConfig | None = None
    """Rewinds after a loss spike too; null does not look for any."""
    hang_timeout: float | None = Field(default=600.0, ge=1)
    """Seconds in which a rank must get on; null never ends a run that hangs. What may take long
    (a growth, a checkpoint, the first step of a stage) has six times as long."""
