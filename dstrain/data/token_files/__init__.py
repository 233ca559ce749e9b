"""Files and records that hold tokens already."""
