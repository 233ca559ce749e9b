"""What a family does, found out by trying a small copy of it."""
