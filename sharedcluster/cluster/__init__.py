"""The primary process and the wire it speaks with its workers; `worker` is the other end of that wire."""
