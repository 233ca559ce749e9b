"""The DeepSpeed JSON of a plan, composed from fragments, with the origin of each key."""
