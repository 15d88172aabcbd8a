"""Layer types: one declaration per type, and the parameter table that follows from them."""
