"""Run files: schema, validation, includes and overrides."""
