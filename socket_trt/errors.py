"""The errors that reach a user: each is one line that says what is wrong and what to do about it.

Everything that a user can cause (a missing file, a wrong option, an unknown model) raises a subclass of
`SocketTrtError`; the command line prints its text and exits with status 2.  Any other exception is a bug.
"""


class SocketTrtError(Exception):
    """Base of the errors a user can cause and mend."""


class ConfigError(SocketTrtError):
    """A parameter is out of its range or contradicts another one."""


class ModelError(SocketTrtError):
    """A model name, configuration or architecture that cannot be used."""


class CheckpointError(SocketTrtError):
    """Weights that are missing, truncated, of another model, or changed since the build."""


class GraphError(SocketTrtError):
    """An ONNX graph that does not have the form it needs to have."""


class EngineError(SocketTrtError):
    """An engine directory that cannot be written, read or run."""


class DeployError(SocketTrtError):
    """An entry of a model repository that cannot be written."""


class RequestError(SocketTrtError):
    """A generation request that cannot be served as it stands."""


class MissingDependencyError(SocketTrtError):
    """A part of the software or of the machine that the command needs and that is not there."""
