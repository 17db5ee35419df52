"""Storage: workdirs, checkpoints, trained runs, official weights."""
