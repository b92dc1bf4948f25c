"""Running a model: architecture, KV cache, block pool, decode steps, sampler, engine. Token ids only, no text."""
