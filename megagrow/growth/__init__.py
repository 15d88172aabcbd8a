"""Growth operators: pure functions from two model configs to a GrowthMap."""
