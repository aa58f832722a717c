"""Many coders on one activation dataset: the grid, training in lockstep, scaling laws, and what they recommend."""
