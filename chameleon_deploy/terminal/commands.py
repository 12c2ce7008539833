"""The commands with their one-line help, and the option groups of --help."""

from __future__ import annotations

COMMANDS = {
    "train": "Train the factors of a frozen base model into a checkpoint.",
    "evaluate": "Compare the held-out perplexity of checkpoints with their base.",
    "compare": "Train and compare base, LoRA, hypernetwork and controls.",
    "export": "Export a checkpoint to a bundle.",
    "engines": "Build the TensorRT engines of a bundle into the local cache.",
    "triton": "Add a bundle to a model repository of Triton.",
    "adapter": "Write an adapter file from a PEFT LoRA.",
    "verify": "Check a bundle against its PyTorch reference, or a machine against the bundle's record.",
    "verify-signature": "Check who signed a bundle.",
    "inspect": "Show what a bundle holds.",
    "generate": "Continue prompts.",
    "chat": "Talk with a bundle in the terminal.",
    "score": "Compute the log-probability and perplexity of texts.",
    "serve": "Serve a bundle over HTTP: OpenAI-style API, metrics, playground.",
    "bench": "Measure a bundle against the PyTorch reference.",
    "gpu-check": "Verify and measure bundles on this machine's GPU.",
    "cache": "List or delete this machine's cached files.",
}


def module_of(command: str) -> str:
    """Return the name of a command's module, or of the package whose __main__ it is."""
    return "chameleon_deploy." + ("bench.gpu_check" if command == "gpu-check" else command.replace("-", "_"))


OPTION_GROUPS = {
    "Texts": (
        "prompt", "prompts", "text", "dataset", "validation_text", "test_text", "train_texts", "validation_texts",
        "test_texts",
    ),
    "Adaptation": ("mode", "tenant", "adapter"),
    "Sampling": (
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "logit_bias", "logprobs", "stop", "ignore_eos",
    ),
    "Training": (
        "regime", "targets", "architecture", "conditioning", "protocol", "preset", "rank", "alpha", "clusters",
        "max_length", "epochs", "lr", "patience", "seeds", "resume",
    ),
    "Execution": ("provider", "threads", "share_weights", "self_check", "trusted_key"),
    "Output": ("out", "as_json", "json_file", "html", "html_file", "wide"),
}  # fmt: skip
