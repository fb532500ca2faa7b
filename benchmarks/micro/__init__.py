"""Instruction counts of the hot paths: they do not depend on how busy the machine is."""
