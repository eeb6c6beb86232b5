"""Plumbing: files, HTTP, the hub, processes, progress, words. Nothing here knows what a policy is."""
