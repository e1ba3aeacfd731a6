"""The command `trl-fdfo`: a module per command, and what they share."""
