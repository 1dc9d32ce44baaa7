"""`mmkernels fetch`: larger data sets from Debian packages, unpacked into a folder that `--data` reads.

mmkernels fetch tuxpaint --languages en es fr        # pictures with captions, spoken by people
mmkernels fetch openclipart --from ./openclipart-*.deb
"""

from mmkernels.pretrain.fetch.apt import FetchError
from mmkernels.pretrain.fetch.cli import main
from mmkernels.pretrain.fetch.deb import Deb

__all__ = ["Deb", "FetchError", "main"]
