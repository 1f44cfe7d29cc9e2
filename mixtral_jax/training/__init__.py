"""Losses, optimizer, step and the loop."""
