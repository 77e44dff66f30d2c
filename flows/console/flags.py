"""What options are called on the command line, by the key of the value that they set."""

from __future__ import annotations

# Those that are not called like their key; of a switch what turns it on, and what turns it off.
FLAGS = {
    "per_channel": ("--per-channel", "--per-tensor"),
    "symmetric": ("--symmetric", "--asymmetric"),
    "bias_correction": ("--bias-correction", "--no-bias-correction"),
    "optimize": ("--optimize", "--no-optimize"),
    "time_budget_s": ("--time-budget",),
}


def flags_of(key: str) -> tuple[str, ...]:
    """The option of that key, as it is typed; of a switch both of its options."""
    return FLAGS.get(key, ("--" + key.replace("_", "-"),))


def flag(key: str) -> str:
    """The option of that key: `block_size` is `--block-size`."""
    return flags_of(key)[0]
