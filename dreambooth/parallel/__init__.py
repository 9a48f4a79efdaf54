"""How ranks share one model: strategies, what each rank holds of it, and checkpoints that any of them can read."""
