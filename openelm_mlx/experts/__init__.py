"""Experts that stay on disk: slots in memory, records in files, and what reads the one into the other."""
