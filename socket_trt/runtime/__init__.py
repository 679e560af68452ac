"""Serving path: sessions, paged cache, scheduler, sampling, text.  Nothing here imports PyTorch."""
