"""Training: the state, the step, its schedule and its figures."""
