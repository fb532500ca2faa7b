"""Keeping applications alive: what they are, what is recorded of them, and the attendant beside each cluster."""
