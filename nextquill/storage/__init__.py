"""Files and folders on disk: each is complete or absent, and one process at a time writes it.

atomic_files.py     files and folders that take their names only when they are complete
checkpoints.py      checkpoints: staged, found, rotated, and tied to one run
fingerprints.py     short digests that tell inputs apart, and seeds made from them
input_files.py      opens the files that a user names, if they are regular files
json_files.py       reads JSON files, and names damaged files and lines
manifests.py        lists of a folder's files with their digests
locks.py            locks that one process at a time can hold
resumable_jsonl.py  JSONL files whose writing can stop at any moment and resume
sample_log.py       the log of sampled texts, cut to its checkpoint when a training resumes
"""
