"""`python -m mmkernels.pretrain`, and so `torchrun -m mmkernels.pretrain`: the command `mmkernels pretrain`."""

import sys

from mmkernels.pretrain import main

sys.exit(main())
