"""Reports on run folders: comparisons and differences."""
