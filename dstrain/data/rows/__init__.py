"""Rows of equal length from documents, and the order in which training takes them."""
