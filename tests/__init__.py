"""Tests, and what they share."""

# Environment variable with the directory that the processes of a test run share.
SHARED_VARIABLE = "SOCKET_TRT_TEST_SHARED"
