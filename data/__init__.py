"""Data: manifests, probing, decoding, the step plan and the Grain pipeline. No JAX, no torch.

`records` reads manifests, `probe` looks at each file once, `sampling` plans which items each step
takes, `video` decodes, and `pipeline` puts them together.
"""

import os

# OpenCV and its FFmpeg would write every oddity of a file to stderr, from many threads at once; we
# report them as errors instead. OpenCV reads the first at import, so it stands before any
# `import cv2` of this package.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
