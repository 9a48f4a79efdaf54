"""Ways of tuning, siblings of each other: what of a family learns, and how the base it grew from is had back."""
