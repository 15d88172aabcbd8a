"""Native sharded checkpoints: atomic, checksummed, loadable under any layout."""
