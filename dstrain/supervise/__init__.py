"""While a run goes on and how it ends: one cause, in words, and nothing left running on any host. No torch here."""
