"""Train a TAEHV: torchrun --nproc_per_node N train.py --config train_configs/X.toml"""

import os
import sys

# Before PyTorch starts its threads: ones that spin while they wait take the cores from
# the decoding processes, which made steps on two cores five times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from taehv.errors import run_command  # noqa: E402


def main() -> None:
    """Read the settings and train."""
    # Imported here because every decoding process imports this file anew, and the
    # trainer last, because it takes seconds.
    from taehv.config import load_config

    config = load_config(sys.argv[1:])
    from taehv.trainer import train

    train(config)


if __name__ == "__main__":
    run_command(main)
