"""The devices: joining processes, sharding over a mesh, and what the chips can do."""
