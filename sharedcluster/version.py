"""The version, in a file of its own: the primary reads it without importing the package's public names."""

VERSION = "0.1.0"
