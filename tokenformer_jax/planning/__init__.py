"""Planning: a step compiled for devices that are not there, and what it costs on them."""
