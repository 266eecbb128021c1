"""Generation beyond plain text: interleaved images and injected thoughts."""
