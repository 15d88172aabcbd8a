"""Colours of a rendered plot."""

from pathlib import Path

from matplotlib.image import imread


def colors(path: Path) -> set[str]:
    """Return the set of pixel colors as `#RRGGBB`."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in set(map(tuple, pixels.tolist()))}
