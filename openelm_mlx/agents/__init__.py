"""Conversations with tools, and the tools: python in a sandbox, patches, local files, MCP servers."""
