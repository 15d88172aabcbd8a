"""What a run is: one validated value, read from YAML."""
