"""Training: steps, the loop that yields events, schedules, counters and metrics."""
