"""What was found, for people: figures, one self-contained page, tables."""
