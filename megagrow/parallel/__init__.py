"""How the model is spread over ranks: topology, slices, collectives, and DeepSpeed's partitions."""
