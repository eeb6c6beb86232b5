"""Numbers: integrals and special functions that the mathematics needs."""
