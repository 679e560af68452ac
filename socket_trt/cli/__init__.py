"""The command line, `socket-trt`."""
