"""Pipeline schedules as tables: made, checked and simulated without torch."""
