"""What one forward is: its tokens, hops and phase, read from its arguments and noted at its end."""
