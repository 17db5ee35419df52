"""The presets: --config=NAME:variant; base explains every key."""
