"""DeepSpeed's engines, patched and extended, behind one interface."""
