"""A saved encoder, fine-tuned on a table of labelled texts, on transformers' Trainer."""
