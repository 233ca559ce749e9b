"""What happened: from a run folder to lines, pictures and pages."""
