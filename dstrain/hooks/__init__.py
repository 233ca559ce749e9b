"""What is optional beside a training, each as a hook: trackers, the profiler."""
