"""How fast models generate, and how much memory that takes: measured side by side."""
