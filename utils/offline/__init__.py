"""Logged experience for offline RL: writing, reading and replaying it."""
