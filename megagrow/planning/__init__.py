"""Plan of a run before it starts: FLOPs, memory, traffic, time, cost."""
