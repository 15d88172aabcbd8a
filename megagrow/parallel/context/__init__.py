"""Context parallelism: shards of the sequence, and the operations that exchange them."""
