"""A model in numbers for the plan: parameters, FLOPs, and what its backward pass keeps."""
