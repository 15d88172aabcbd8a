"""What a machine, or all hosts of a job, can do, and what is wrong with them."""
