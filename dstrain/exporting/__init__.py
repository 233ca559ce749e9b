"""From a run's checkpoint to a Hugging Face folder, and a look at what came out."""
