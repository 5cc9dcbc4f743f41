"""torch and Transformers alone, for both environments: packed trees, log-probabilities, what a model says of a response."""
