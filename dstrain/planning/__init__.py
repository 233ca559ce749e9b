"""Planning: layout, batch arithmetic, partition, DeepSpeed JSON and checks, as pure data and functions."""
