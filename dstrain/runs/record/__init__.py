"""What decides a run's numbers: written into its folder at each launch, and compared when the run is repeated."""
