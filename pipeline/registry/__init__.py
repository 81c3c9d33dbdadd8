"""Versions of models in object storage or a folder, and which of them is the champion. No server: one swap promotes.

    ROOT/NAME/versions/VERSION/    model.json, weights: written once; VERSION is a hash of what they hold
    ROOT/NAME/champion.json        who it is, since when and why; replaced whole, by compare-and-swap
    ROOT/NAME/history/000007.json  the same of each promotion and rollback, by its epoch, written once
    ROOT/NAME/pinned/VERSION       why that version is never deleted

Whoever swaps names the tag that he read, so of two at once one wins, and the other hears of it. A night that may have
been given up for dead is fenced: its successor swaps champion.json for one with another mark before it begins, and no
tag read earlier is good any more. history/N is written before champion.json leaves epoch N, so that no crash leaves a
gap in it.
"""

from pipeline.registry.champions import Champion, champion, collect, fence, history, promote, rollback
from pipeline.registry.places import who
from pipeline.registry.specs import CHAMPION, is_spec, parse, resolve
from pipeline.registry.versions import (
    describe,
    has,
    names,
    pin,
    pinned,
    publish,
    read_file,
    unpin,
    version_path,
    versions,
)

__all__ = ["CHAMPION", "Champion", "champion", "collect", "describe", "fence", "has", "history", "is_spec", "names"]
__all__ += ["parse", "pin", "pinned", "promote", "publish", "read_file", "resolve", "rollback", "unpin", "version_path"]
__all__ += ["versions", "who"]
