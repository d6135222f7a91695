"""Trains a small DeepSeek-V4 model with every mechanism of the family on: ``python -m examples.train_nano --help``."""
