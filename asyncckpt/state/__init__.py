"""Training state: what a user's objects hold, as a tree of tensors and plain values, and back into the objects."""
