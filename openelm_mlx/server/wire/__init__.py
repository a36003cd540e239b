"""What goes over the wire, one file an API: its requests, its answers, its events."""
