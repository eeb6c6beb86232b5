"""Servers: a run's reward for other trainers, and an inference-time procedure behind the OpenAI protocol."""
