"""Helpers without knowledge of models or training: files, sizes, checksums, progress."""
