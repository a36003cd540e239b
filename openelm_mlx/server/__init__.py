"""Models over HTTP: OpenAI's and Anthropic's APIs, and a page to chat on. Starlette and uvicorn; the engine computes."""
