"""DeepSpeed's engines, mended and extended, behind one interface."""
