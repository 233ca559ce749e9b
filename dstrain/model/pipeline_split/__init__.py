"""How a family is taken apart: where its parts are, how its own forward is driven in parts, whether it can be cut."""
