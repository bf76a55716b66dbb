"""What is known of transformers models: their heads, kinds and layers, and how they are loaded."""
