"""Recorded rollouts: their files, and what other trust regions would have decided on the same tokens (docs/replay.md)."""
