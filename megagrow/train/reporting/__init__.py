"""The run's log, metrics and trackers."""
