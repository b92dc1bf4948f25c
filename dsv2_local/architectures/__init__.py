"""What a model is: `config.json` read into a `ModelConfig`, and the names and shapes of its tensors, by family."""
