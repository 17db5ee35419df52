"""A training run: how it is opened, taken up again and grown, and its loop."""
