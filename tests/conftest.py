"""Settings of the whole suite."""

import os

# One thread: the models here are tiny, and threads that spin for work slow each other down on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
