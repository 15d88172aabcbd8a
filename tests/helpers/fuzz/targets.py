"""All fuzz targets."""

from tests.helpers.fuzz import checkpoints, configs, files

TARGETS = [*configs.TARGETS, *files.TARGETS, *checkpoints.TARGETS]
