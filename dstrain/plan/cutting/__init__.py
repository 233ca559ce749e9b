"""Where the layers of a run are cut into stages."""
