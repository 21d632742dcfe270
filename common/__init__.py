"""Ground floor: what every other folder may import and what imports nothing of ours."""
