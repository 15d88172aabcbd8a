"""How state moves: who holds what (layout), what goes where (plan), and the moving (exchange)."""
