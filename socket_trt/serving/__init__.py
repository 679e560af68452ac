"""Serving in Triton Inference Server.  Nothing here imports PyTorch, nor knows what runs the engine."""
