"""Data for the reference loop: what comes along, your own folder, tar shards, Hugging Face data sets.

```python
data = open_data("emoji")
data.train[0].values["text"]  # a Text: captions, keywords
data.held_out["A"]            # a Source like data.train
```
"""

from mmkernels.pretrain.data.base import (
    BrokenImageError,
    BrokenLog,
    Data,
    Document,
    Regions,
    Sample,
    Source,
    Subset,
    Text,
    TooManyBrokenError,
)
from mmkernels.pretrain.data.collate import Collator
from mmkernels.pretrain.data.dealing import Dealer
from mmkernels.pretrain.data.decode import decode_image
from mmkernels.pretrain.data.emoji import EmojiDataset, EmojiPack, load_emoji, load_pack
from mmkernels.pretrain.data.filter_list import FilterList
from mmkernels.pretrain.data.folder import FolderDataset
from mmkernels.pretrain.data.hub import HubDataset
from mmkernels.pretrain.data.loader import TrainLoader
from mmkernels.pretrain.data.mixed import Mixed, mix
from mmkernels.pretrain.data.opening import EMBEDDED, open_data
from mmkernels.pretrain.data.sampler import BatchSampler, TokenSampler
from mmkernels.pretrain.data.shares import Shares, check_weights
from mmkernels.pretrain.data.staged import StagedSampler
from mmkernels.pretrain.data.tables import TableFormat
from mmkernels.pretrain.data.webdataset import WebDataset
from mmkernels.pretrain.data.windowed import WindowedSampler

__all__ = [
    "EMBEDDED",
    "BatchSampler",
    "BrokenImageError",
    "BrokenLog",
    "Collator",
    "Data",
    "Dealer",
    "Document",
    "EmojiDataset",
    "EmojiPack",
    "FilterList",
    "FolderDataset",
    "HubDataset",
    "Mixed",
    "Regions",
    "Sample",
    "Shares",
    "Source",
    "StagedSampler",
    "Subset",
    "TableFormat",
    "Text",
    "TokenSampler",
    "TooManyBrokenError",
    "TrainLoader",
    "WebDataset",
    "WindowedSampler",
    "check_weights",
    "decode_image",
    "load_emoji",
    "load_pack",
    "mix",
    "open_data",
]
