"""What a run will need and take, before it runs: memory, time, traffic, disk."""
