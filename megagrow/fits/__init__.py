"""Growth guidelines fitted to a user's runs: growth timing, growth factor and FLOP savings."""
