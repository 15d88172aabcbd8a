"""Everything that happens between two stages."""
