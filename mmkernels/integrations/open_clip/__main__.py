"""`open_clip_train.main` with the losses of mmkernels: the same arguments.

python -m mmkernels.integrations.open_clip --model ViT-B-32 --train-data ...
torchrun --nproc-per-node 8 -m mmkernels.integrations.open_clip --model ViT-B-32 --train-data ...
"""

from __future__ import annotations

import sys

from open_clip_train.main import main

from mmkernels.integrations.open_clip.patching import patched

if __name__ == "__main__":
    with patched():
        main(sys.argv[1:])
