"""BERT's pre-training: text to shards of tokens, packed batches without padding, MLM and NSP."""
