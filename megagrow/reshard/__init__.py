"""State movement: layouts (who holds which part), plans (which part goes where), the exchange."""
