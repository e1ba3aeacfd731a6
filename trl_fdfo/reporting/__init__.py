"""Everything that a run shows: logs, progress bars, pictures, curves."""
