"""The bench: runs over methods, tasks, modes and seeds, and what a finished cell is worth today."""
