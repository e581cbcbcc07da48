"""ChatGLM in PyTorch: configuration, tokenizer, weights, layers, kernels. Does not know the engine."""
