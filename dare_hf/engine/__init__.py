"""What runs on a patched model: hooks of a forward, routed layers, generate, and their undoing."""
