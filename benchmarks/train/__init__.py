"""Fine-tuning: MedForge, LLaMA-Factory and ms-swift do the same work, in turn, each in its own environment."""
