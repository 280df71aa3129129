"""Hub: push experts and their model cards to the Hugging Face hub, and pull them, every byte checked."""
