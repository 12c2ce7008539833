"""Every error that a user can cause, one class per fault.

`code` is part of the contract: the C++ runtime throws the same word for the same fault, and consumers of `--json` may
match it. The message says what was wrong, where, and what to do.
"""

from __future__ import annotations


class ChameleonError(Exception):
    """Base of all errors raised on purpose by chameleon_deploy.

    code      the fault, one word of the contract
    argument  name of the argument that is at fault, such as "max_new_tokens" or a field of Sampling; None where there
              is none, or more than one
    """

    code = "error"

    def __init__(self, message: str = "", argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class BundleNotFoundError(ChameleonError):
    code = "bundle_not_found"


class ManifestError(ChameleonError):
    """bundle.json is missing, is not JSON, or does not have the fields it must have."""

    code = "manifest_invalid"


class VersionError(ChameleonError):
    """A format_version that this release does not support."""

    code = "version_unsupported"


class UnknownFileError(ChameleonError):
    """The bundle holds a file that its manifest does not list."""

    code = "file_unknown"


class MissingFileError(ChameleonError):
    code = "file_missing"


class PathError(ChameleonError):
    """A path that leaves its directory: it contains `..`, is absolute, or leads through a symlink."""

    code = "path_unsafe"


class DigestError(ChameleonError):
    """A file's size or SHA-256 differs from the manifest."""

    code = "digest_mismatch"


class TensorError(ChameleonError):
    """A stored tensor has the wrong name, shape, dtype or non-finite values."""

    code = "tensor_invalid"


class GraphError(ChameleonError):
    """ONNX Runtime refuses a graph, or its inputs and outputs differ from the manifest."""

    code = "graph_invalid"


class SignatureError(ChameleonError):
    """A bundle has no signature, or none of a trusted key."""

    code = "signature_invalid"


class BundleChangedError(ChameleonError):
    """A file of a loaded bundle was changed, replaced or removed: load the bundle again."""

    code = "bundle_changed"


class CheckpointError(ChameleonError):
    code = "checkpoint_invalid"


class UnsupportedBaseError(ChameleonError):
    """The base model is of a family that cannot be exported."""

    code = "base_unsupported"


class RecipeError(ChameleonError):
    code = "recipe_invalid"


class OutputExistsError(ChameleonError):
    code = "output_exists"


class OutputError(ChameleonError):
    """The output could not be written: no space, no permission, or another writer at work."""

    code = "output_failed"


class InputError(ChameleonError):
    """Texts, prompts or sampling settings that make no sense: empty, mixed, not UTF-8, out of range."""

    code = "input_invalid"


class TokenError(ChameleonError):
    """A token id that the vocabulary does not have."""

    code = "token_invalid"


class LengthError(ChameleonError):
    """A text longer than the model's positions."""

    code = "text_too_long"


class ModeError(ChameleonError):
    """An adaptation mode that does not exist or that this bundle cannot serve."""

    code = "mode_unavailable"


class FactorsError(ChameleonError):
    """Caller-supplied lora_A or lora_B with the wrong shape, dtype or non-finite values."""

    code = "factors_invalid"


class AdapterError(ChameleonError):
    """An adapter that is not loaded, or a file that is not an adapter of this bundle."""

    code = "adapter_invalid"


class ProviderError(ChameleonError):
    """The execution provider is not available on this machine."""

    code = "provider_unavailable"


class ProfileError(ChameleonError):
    """A TensorRT optimization profile that is contradictory or exceeds the model's positions."""

    code = "profile_invalid"


class EngineError(ChameleonError):
    """TensorRT cannot read a graph or build an engine from it."""

    code = "engine_failed"


class DeviceError(ChameleonError):
    """A GPU or an engine on it failed: out of memory, or the device is lost."""

    code = "device_failed"


class NumericError(ChameleonError):
    """The model produced a value that is not finite."""

    code = "not_finite"


class QueueFullError(ChameleonError):
    """The engine's queue is full: try again later."""

    code = "queue_full"


class RateLimitError(ChameleonError):
    """A tenant has used its tokens of this minute.

    retry_seconds  after which it may try again
    """

    code = "rate_limited"

    def __init__(self, message: str = "", argument: str | None = None, retry_seconds: int = 1) -> None:
        super().__init__(message, argument)
        self.retry_seconds = retry_seconds


class ClosedError(ChameleonError):
    """The engine is closed, or is draining and accepts no new request."""

    code = "closed"


class RequestError(ChameleonError):
    """A decoder call failed and ended the requests that were in it. `__cause__` is the original error."""

    code = "request_failed"


class DependencyError(ChameleonError):
    """An optional package is missing, or two that exclude each other are installed."""

    code = "dependency_missing"


class DownloadError(ChameleonError):
    """Object storage cannot be reached, or refuses to be read."""

    code = "download_failed"


class DatasetError(ChameleonError):
    code = "dataset_unavailable"


class CheckFailedError(Exception):
    """The work was done and a check failed: a command's exit code is 1."""
