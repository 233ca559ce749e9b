"""Which layout to take: all that these devices can hold, the fastest of those that fit."""
