"""The work of each stage: read what earlier ones left in the run folder, add one thing to it."""
