"""Engine directories: what `socket-trt build` writes and every other command reads."""
