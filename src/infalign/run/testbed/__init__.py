"""Real text that needs no download, and tiny models trained from scratch on it (or on any text of the same form)."""
