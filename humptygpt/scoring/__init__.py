"""How well a trained model predicts texts, and what it recites."""
