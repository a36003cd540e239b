"""The other machine's side: a process that serves some of a model's layers to one first machine at a time."""
