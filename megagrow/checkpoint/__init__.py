"""What survives: sharded checkpoints that are whole or absent, readable from any layout."""
