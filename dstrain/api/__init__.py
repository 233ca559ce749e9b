"""A plan is carried out: from the folder of the run to its last words."""
