"""Apple OpenELM and OpenAI gpt-oss on Apple MLX: exact, in the memory the machine has, as fast as it allows."""
