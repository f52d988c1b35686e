"""Generation: sampling, batches of prompts, and text with stop strings."""
