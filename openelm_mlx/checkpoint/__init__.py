"""Bytes on disk: reading, renaming, quantizing and writing checkpoints in bounded memory."""
