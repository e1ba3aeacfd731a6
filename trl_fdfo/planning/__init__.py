"""The plan of a run before it starts: its rollouts, its compute and its memory."""
