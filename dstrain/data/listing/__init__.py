"""Which files a source of data has: in folders, by patterns, of saved data sets, on the hub."""
