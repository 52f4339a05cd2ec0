"""Files and folders that are complete or absent, one writer at a time: everything nextquill leaves on a disk.

atomic_files.py     a file or a folder takes its name only when it is finished
checkpoints.py      checkpoints: staged, found, rotated, and whose they are
fingerprints.py     short digests that tell inputs apart
json_files.py       JSON that is read, and whose damage is named
locks.py            one process at a time
resumable_jsonl.py  lines of JSON whose writing can stop at any moment and resume
"""

from __future__ import annotations
