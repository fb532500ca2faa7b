"""Operating a running cluster over its control socket."""
