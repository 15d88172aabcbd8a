"""One step, then many: schedules, counters, metrics, and the loop that yields events."""
