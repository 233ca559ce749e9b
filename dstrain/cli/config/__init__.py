"""``dstrain config``: a file a command."""
