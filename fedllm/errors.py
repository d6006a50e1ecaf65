"""The exception hierarchy: every error names the key, node or file, what was expected and what was found."""


class FedLLMError(Exception):
    """Base of all errors that fedllm raises on purpose."""


class ConfigError(FedLLMError):
    """A configuration key is unknown, has the wrong type or lies out of bounds."""


class ModelError(FedLLMError):
    """A model, tokenizer or adapter cannot be found, loaded or used."""


class DataError(FedLLMError):
    """A data source, column, label or partition is missing or unusable."""


class ReplyError(FedLLMError):
    """A client's reply must not touch the global model."""


class PlanError(FedLLMError):
    """A round cannot be planned: too few nodes, or a node that cannot do what it is asked."""


class RoundError(FedLLMError):
    """A round, or the run, cannot go on."""


class CheckpointError(FedLLMError):
    """No usable checkpoint, or one of another run."""


class RegistryError(FedLLMError):
    """A strategy, client, defence, attack or sink cannot be found or loaded."""


class SplitError(FedLLMError):
    """A model that cannot be cut as asked, or a split-learning stream that broke its contract."""


class TrainError(FedLLMError):
    """Local training went wrong: a loss that is not finite, or settings that cannot work together."""


class NonFiniteLossError(TrainError):
    """The loss, or its gradient, is not finite at the model that a client was sent: that model is of no use."""


class WorkerError(FedLLMError):
    """A node's resident worker cannot be reached, refused a message, or ended in the middle of one."""
