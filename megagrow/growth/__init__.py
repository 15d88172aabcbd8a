"""How a model becomes a larger one: pure functions from two configs to a GrowthMap."""
