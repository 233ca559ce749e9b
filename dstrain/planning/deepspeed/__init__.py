"""The DeepSpeed JSON of a plan: composed from fragments, each key with its origin."""
