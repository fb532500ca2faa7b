"""Where load comes from: wrk where it serves, our own client where it does not."""
