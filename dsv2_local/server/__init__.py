"""The server: OpenAI, Anthropic and Ollama APIs over HTTP."""
