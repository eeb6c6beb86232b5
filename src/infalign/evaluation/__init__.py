"""Proof: inference-time win rates against KL from arrays of rewards, and how methods differ."""
