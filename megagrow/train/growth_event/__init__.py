"""Growth events: all actions between two stages."""
