"""Growth and shrinking: recipes, their checks, the ladder, and the way from a checkpoint to its successor."""
