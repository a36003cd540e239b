"""The mistakes a user can make, as exceptions.

Each message is one sentence (or two) for the person at the keyboard: what is wrong, which value, and the next step.
The command line prints the message and ends with exit code 2; a program can catch `UserError` for all of them.
What only this library can get wrong is an `assert`, not one of these.
"""


class UserError(ValueError):
    """Base of every error that the user's input or machine can cause."""


class ConfigError(UserError):
    """A model's config.json (or YAML) is missing, unreadable, or describes a model of an unknown family."""


class CheckpointError(UserError):
    """Weights are missing, damaged, of an unexpected name, shape or type, or in a format that is not read."""


class TokenizerError(UserError):
    """There is no tokenizer, or it does not belong to the model."""


class PromptError(UserError):
    """A prompt is empty, longer than the model's context, or not text."""


class SettingError(UserError):
    """An option has a value outside its range."""


class HubError(UserError):
    """A Hugging Face repository is missing, gated or unreachable, or a transfer failed."""


class DataError(UserError):
    """Data to learn from cannot be read or used; the message says which line."""


class TrainingError(UserError):
    """A run of training cannot go on: a loss that is no number, or a state of another run."""


class DestinationError(UserError):
    """An output folder exists already, cannot be written, or the disk is too small."""


class ConversionError(UserError):
    """A conversion was asked for something it cannot do, or its verification failed."""


class PlatformError(UserError):
    """This computer cannot run MLX as it is: an Intel Mac, Rosetta, or a missing backend."""


class MemoryLimitError(UserError):
    """Something needs more memory than there is, or than the limit that was set; the message has the arithmetic."""


class EngineFullError(UserError):
    """An engine has as many requests waiting as it may have: ask again later."""


class EngineClosedError(UserError):
    """An engine was asked for something after it had been closed, or while it was being closed."""


class WorkerError(UserError):
    """A machine that computes some of a model's layers is not there, was lost, or is not the one that it should be."""


class ToolError(UserError):
    """A tool's definition, a schema, or the place a tool should run in is not usable."""


class NoAnswerWarning(UserWarning):
    """A call that returns the answer's text has none to return; the message says why, and what to change."""
