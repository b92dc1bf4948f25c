"""Functions that a model may call: their definitions, calls and results in a prompt, and calls in an answer."""
