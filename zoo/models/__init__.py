"""Network definitions that torchvision does not have."""
