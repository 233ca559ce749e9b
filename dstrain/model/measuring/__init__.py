"""Measures a model for the plan: parameters, FLOPs, and activation memory."""
