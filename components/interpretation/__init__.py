"""What the features of a coder stand for: where they fire, what they do to the logits, and a browser for both."""
