"""Layout search: the fastest layouts that fit on the given devices."""
