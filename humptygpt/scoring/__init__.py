"""How well a trained model predicts texts and answers questions."""
