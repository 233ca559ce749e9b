"""A plan for the eyes: what `dstrain plan` and `dstrain run` show of it."""
