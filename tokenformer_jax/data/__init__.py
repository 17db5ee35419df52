"""The data: tokenizer, sources of text, the prepared tokens, batches."""
