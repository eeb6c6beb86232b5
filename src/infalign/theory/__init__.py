"""What a procedure and a KL budget promise, before any model is trained: exact, in the reference's quantile space."""
