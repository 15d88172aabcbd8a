"""Pipeline parallelism: assignment of layers to ranks, schedules and their execution."""
