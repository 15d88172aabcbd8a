"""Heartbeats, stability guards, signals and the run lock."""
