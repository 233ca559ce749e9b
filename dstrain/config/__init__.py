"""What is wanted: the run config, typed and strict, each value with its origin."""
