"""From a static model to integer accelerators."""
