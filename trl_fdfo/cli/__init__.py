"""The command line: what the scripts of examples/ share."""
