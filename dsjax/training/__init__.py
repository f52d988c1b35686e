"""Training: schedules, the optimiser step, and the loop around them."""
