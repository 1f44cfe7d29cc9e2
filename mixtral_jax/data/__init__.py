"""Text to batches: sources, tokenizer, token cache, packing."""
