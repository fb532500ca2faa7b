"""A load generator: forked client processes on raw sockets, and a report that says what it means."""
