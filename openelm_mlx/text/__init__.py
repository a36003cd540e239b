"""Strings and tokens: tokenizers, chat templates, stop strings. No array library is imported here."""
