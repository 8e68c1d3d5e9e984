"""Loss, training loop, evaluation."""
