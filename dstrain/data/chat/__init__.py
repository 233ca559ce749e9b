"""Conversations: the formats that their records come in, and their tokens with the part of each in the loss."""
