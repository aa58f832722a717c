"""What features stand for, in words: a language model reads examples, and its explanations are scored on others."""
