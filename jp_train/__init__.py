"""jp_train: training of Janus-Pro style unified models on DeepSpeed ZeRO-3.

Importing the package touches no device, process group, network, seed or logger. Open `jp_train/train/trainer.py` first.
"""

__version__ = "0.1.0"
