"""Model families: how a sample becomes their tokens, what LoRA tunes in them, and a tiny one to try things on."""
