"""Draw responses from a policy, score them, and keep both in one store that never mixes and never loses work."""
