"""The run config: typed and strict, with the origin of each value."""
