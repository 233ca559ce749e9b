"""Built-in hooks: experiment trackers and the profiler."""
