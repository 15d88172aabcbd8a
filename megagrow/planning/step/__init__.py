"""Time of a training step on a cluster, by the sizes of the work and measured efficiencies."""
