"""`python -m sharedcluster` is the `sharedcluster` command."""

from sharedcluster.cli import main

main()
