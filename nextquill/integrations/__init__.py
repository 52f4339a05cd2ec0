"""Glue between the losses and training loops: the loss inside a model's head, and the Hugging Face Trainer."""
