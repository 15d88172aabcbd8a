"""Guidelines fitted to runs of one's own: when to grow, by how much, what it saves."""
