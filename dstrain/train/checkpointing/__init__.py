"""How a run is saved while it trains, and which checkpoint it goes on from."""
