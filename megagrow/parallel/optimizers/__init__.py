"""Optimizers: the state of each parameter, its growth law, and Muon on sharded matrices."""
