"""`socket-trt validate`: an engine directory against PyTorch, gate by gate."""
