"""Experts that stay on disk: slots in memory, records in files, and reading records into slots."""
