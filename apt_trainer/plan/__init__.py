"""Which units stay, and what they cost: plans, costs, selection, limits, ranks and the schedule."""
