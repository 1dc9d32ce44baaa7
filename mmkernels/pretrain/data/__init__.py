"""Image-text data for the reference loop: the embedded emoji, the user's folder, tar shards.

```python
data = open_data("emoji")
loader = TrainLoader(data.train, batch_size=256, seed=0)
batch = next(loader)          # batch.images [B, 3, 32, 32], batch.text (packed word tokens)
data.evals["A"]               # a RetrievalSet: images, captions, targets, chance(k)
```
"""

from .augment import Augment, plain_images
from .base import BrokenImageError, BrokenLog, ImageTextDataset, Sample, Subset, TooManyBrokenError
from .emoji import EmojiDataset, EmojiPack, load_emoji, load_pack
from .folder import FolderDataset
from .loader import Batch, Data, TrainLoader, open_data
from .retrieval import Chance, RetrievalSet
from .sampler import BatchSampler
from .tables import TableFormat
from .text import TextBatch, Tokenizer
from .webdataset import WebDataset

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
    "ImageTextDataset",
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
