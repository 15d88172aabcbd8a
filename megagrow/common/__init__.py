"""Helpers without knowledge of models or training: files, formatting, checksums, progress."""
