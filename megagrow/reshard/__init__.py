"""Resharding of model state: layouts, copy plans and the exchange between ranks."""
