"""From a request to what its caller sees: prompts, checked requests, sequences of tokens, and who runs them."""
