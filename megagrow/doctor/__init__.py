"""Diagnostics of one machine or of all hosts of a job: `megagrow doctor`."""
