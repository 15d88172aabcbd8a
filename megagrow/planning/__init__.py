"""What a run is going to be before it starts: FLOPs, memory, traffic, time, cost."""
