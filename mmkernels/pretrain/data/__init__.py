"""Image-text data for the reference loop: the embedded emoji, your own folder, tar shards.

```python
data = open_data("emoji")
loader = TrainLoader(data.train, batch_size=256, seed=0)
batch = next(loader)          # batch.images [B, 3, 32, 32], batch.text (packed word tokens)
data.evals["A"]               # a RetrievalSet: images, captions, targets, chance(k)
```
"""

from mmkernels.pretrain.data.augment import Augment, plain_images
from mmkernels.pretrain.data.base import (
    BrokenImageError,
    BrokenLog,
    Source,
    Sample,
    Subset,
    TooManyBrokenError,
)
from mmkernels.pretrain.data.emoji import EmojiDataset, EmojiPack, load_emoji, load_pack
from mmkernels.pretrain.data.folder import FolderDataset
from mmkernels.pretrain.data.loader import Batch, Data, TrainLoader, open_data
from mmkernels.pretrain.data.retrieval import Chance, RetrievalSet
from mmkernels.pretrain.data.sampler import BatchSampler
from mmkernels.pretrain.data.tables import TableFormat
from mmkernels.pretrain.data.text import TextBatch, Tokenizer
from mmkernels.pretrain.data.webdataset import WebDataset

__all__ = [
    "Augment",
    "Batch",
    "BatchSampler",
    "BrokenImageError",
    "BrokenLog",
    "Chance",
    "Data",
    "EmojiDataset",
    "EmojiPack",
    "FolderDataset",
    "Source",
    "RetrievalSet",
    "Sample",
    "Subset",
    "TableFormat",
    "TextBatch",
    "Tokenizer",
    "TooManyBrokenError",
    "TrainLoader",
    "WebDataset",
    "load_emoji",
    "load_pack",
    "open_data",
    "plain_images",
]
