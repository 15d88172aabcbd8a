"""Distribution over ranks: process groups, tensor parallelism, collectives, engine."""
